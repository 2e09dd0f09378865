import { h, setText } from './dom.js'
import { bytes, number, seconds } from './format.js'

/** Of a run's steps that the page has seen. */
const MOST_POINTS = 5000
const HEIGHT = 150
/** Between two drawings: a run may do more steps in a second than a screen shows. */
const DRAW_MS = 250

/** @typedef {{ label: string, color: string, scale?: string, dash?: number[], read: (receipt: any) => number | undefined }} Line */
/** @typedef {{ title: string, format: (value: number) => string, lines: Line[], empty?: string }} Panel */

const heads = (/** @type {any} */ { clipped_heads }) => {
  const counts = Object.values(clipped_heads)
  return counts.length === 0 ? undefined : counts.reduce((sum, more) => sum + more, 0)
}

/** @type {Panel[]} */
const PANELS = [
  {
    title: 'Gradient norm',
    format: number,
    lines: [{ label: 'L2 norm', color: '--c1', read: ({ gradient_norm }) => gradient_norm }],
  },
  {
    title: 'Update RMS',
    format: number,
    lines: [{ label: 'RMS', color: '--c2', read: ({ measured }) => measured?.update_rms }],
  },
  {
    title: 'Attention logits',
    format: number,
    lines: [
      { label: 'largest', color: '--c3', read: ({ max_logit }) => max_logit },
      { label: 'clipped heads', color: '--c4', scale: 'heads', read: heads },
    ],
    empty: 'No max_logits have come with these steps.',
  },
  {
    title: 'Wall-clock time of a step',
    format: seconds,
    lines: [{ label: 'from end to end', color: '--c1', read: ({ measured }) => measured?.wall_seconds }],
  },
  {
    title: 'Time in phases, summed over parameters',
    format: seconds,
    lines: ['receive', 'queue', 'compute', 'send'].map((phase, i) => ({
      label: phase,
      color: `--c${i + 1}`,
      read: (receipt) => receipt.seconds[phase],
    })),
  },
  {
    title: 'Throughput',
    format: (value) => `${bytes(value)}/s`,
    lines: [
      { label: 'gradients', color: '--c1', read: (receipt) => perSecond(receipt, 'gradient_bytes') },
      { label: 'updates', color: '--c3', dash: [5, 5], read: (receipt) => perSecond(receipt, 'update_bytes') },
    ],
  },
]

/**
 * @param {any} receipt
 * @param {'gradient_bytes' | 'update_bytes'} name
 */
function perSecond({ measured }, name) {
  return measured && measured.wall_seconds > 0 ? measured[name] / measured.wall_seconds : undefined
}

/** @type {Promise<any> | undefined} */
let library

/** @returns {Promise<any>} uPlot, loaded when the first chart is drawn */
function loadLibrary() {
  library ??= new Promise((resolve, reject) => {
    const script = h('script', { src: 'ui/uPlot.iife.min.js' })
    script.onload = () => resolve(Reflect.get(globalThis, 'uPlot'))
    script.onerror = () => reject(new Error('the charts could not be loaded'))
    document.head.append(script)
  })
  return library
}

/** The charts of a run: they take receipts, and draw a few times a second what has come. */
export class Charts {
  /** @type {number[]} */
  #steps = []
  #parts = PANELS.map((panel) => new Part(panel))
  #isDue = false
  element = h('div', { class: 'charts' }, ...this.#parts.map(({ element }) => element))

  /** @param {any} receipt */
  push(receipt) {
    // A run that went back does its steps again.
    while (this.#steps.length > 0 && this.#steps[this.#steps.length - 1] >= receipt.step) this.#drop('pop')
    this.#steps.push(receipt.step)
    for (const part of this.#parts) part.push(receipt)
    if (this.#steps.length > MOST_POINTS) this.#drop('shift')
    this.#isDue = true
  }

  /**
   * Draws until the page is left.
   * @param {AbortSignal} signal
   */
  async live(signal) {
    const uPlot = await loadLibrary()
    if (signal.aborted) return
    const build = () => {
      for (const part of this.#parts) part.build(uPlot, this.#steps)
    }
    const draw = () => {
      if (!this.#isDue || document.hidden) return
      this.#isDue = false
      // A chart in a frame: all of them in one would hold up scrolling.
      for (const [i, part] of this.#parts.entries()) setTimeout(() => part.draw(this.#steps), i * 20)
    }
    build()
    const colors = matchMedia('(prefers-color-scheme: dark)')
    colors.addEventListener('change', build, { signal })
    const timer = setInterval(draw, DRAW_MS)
    const resized = new ResizeObserver(() => {
      for (const part of this.#parts) part.resize()
    })
    resized.observe(this.element)
    signal.addEventListener('abort', () => {
      clearInterval(timer)
      resized.disconnect()
      for (const part of this.#parts) part.destroy()
    })
  }

  /** @param {'pop' | 'shift'} end */
  #drop(end) {
    this.#steps[end]()
    for (const part of this.#parts) part.drop(end)
  }
}

/** One chart with its caption, which has the values under the pointer, or else the newest. */
class Part {
  /** @type {any} */
  #plot
  #panel
  /** @type {(number | null)[][]} */
  #values
  #said
  #place = h('div', { class: 'plot', 'aria-hidden': true })
  #none

  /** @param {Panel} panel */
  constructor(panel) {
    this.#panel = panel
    this.#values = panel.lines.map(() => [])
    this.#said = panel.lines.map(() => h('b', {}, '–'))
    this.#none = h('p', { class: 'empty' }, panel.empty ?? 'No step yet.')
    const legend = panel.lines.map(({ label, color }, i) => {
      const swatch = h('i', { 'aria-hidden': true })
      swatch.style.background = `var(${color})`
      return h('span', {}, swatch, `${label} `, this.#said[i])
    })
    const caption = h('figcaption', {}, h('h3', {}, panel.title), h('div', { class: 'legend' }, ...legend))
    this.element = h('figure', {}, caption, this.#place, this.#none)
  }

  element

  /** @param {any} receipt */
  push(receipt) {
    for (const [i, { read }] of this.#panel.lines.entries()) this.#values[i].push(read(receipt) ?? null)
  }

  /** @param {'pop' | 'shift'} end */
  drop(end) {
    for (const values of this.#values) values[end]()
  }

  /**
   * @param {any} uPlot
   * @param {number[]} steps
   */
  build(uPlot, steps) {
    this.destroy()
    const style = getComputedStyle(document.documentElement)
    const color = (/** @type {string} */ name) => style.getPropertyValue(name).trim()
    const { lines, format } = this.#panel
    const axis = {
      stroke: color('--quiet'),
      grid: { stroke: color('--line'), width: 1 },
      ticks: { show: false },
      font: '11px system-ui',
    }
    const y = { ...axis, size: 62, values: (/** @type {any} */ _, /** @type {number[]} */ ticks) => ticks.map(format) }
    const own = lines.some(({ scale }) => scale)
      ? [{ ...axis, scale: 'heads', side: 1, size: 32, grid: { show: false } }]
      : []
    const options = {
      ...{ width: this.#width, height: HEIGHT, legend: { show: false } },
      scales: {
        x: { time: false },
        heads: {
          range: (/** @type {any} */ _, /** @type {number} */ __, /** @type {number} */ most) => [0, Math.max(1, most)],
        },
      },
      axes: [{ ...axis, size: 26, space: 70 }, y, ...own],
      series: [
        {},
        ...lines.map(({ scale = 'y', color: name, dash }) => ({
          scale,
          stroke: color(name),
          dash,
          width: 1.5,
          points: { show: false },
        })),
      ],
      cursor: { sync: { key: 'steps' }, drag: { x: true, y: false } },
      hooks: { setCursor: [() => this.#say()] },
    }
    this.#plot = new uPlot(options, [steps, ...this.#values], this.#place)
    this.draw(steps)
  }

  /** @param {number[]} steps */
  draw(steps) {
    if (!this.#plot) return
    const isEmpty = this.#values.every((values) => values.every((value) => value === null))
    this.#none.hidden = !isEmpty
    this.#place.hidden = isEmpty
    if (isEmpty) return
    this.resize()
    this.#plot.setData([steps, ...this.#values])
    this.#say()
  }

  resize() {
    if (this.#plot && this.#width > 0 && this.#plot.width !== this.#width)
      this.#plot.setSize({ width: this.#width, height: HEIGHT })
  }

  destroy() {
    this.#plot?.destroy()
    this.#plot = undefined
  }

  get #width() {
    return this.element.clientWidth - 24
  }

  #say() {
    const { idx } = this.#plot.cursor
    const { lines, format } = this.#panel
    this.#values.forEach((values, i) => {
      const value = values[idx ?? values.length - 1]
      const write = lines[i].scale ? number : format
      setText(this.#said[i], value === null || value === undefined ? '–' : write(value))
    })
  }
}
