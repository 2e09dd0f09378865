import { h, setText } from './dom.js'
import { bytes, count, number } from './format.js'
import { get, Problem } from './service.js'
import { VirtualTable } from './table.js'
import { sleep } from './wait.js'

/** Parameters that one request asks for: more would keep the service from its steps for longer than a step of them. */
const PAGE = 200
/** Between two looks at what the rows in view have become. */
const REFRESH_MS = 3000
/** State of more bytes is read only when its reader asks for it: the service walks over all of it. */
const READ_BYTES = 4 << 20
/** So old may be what is shown of a state. */
const STATE_MS = 30_000

/** @typedef {{ rms?: string, at: number, isReading: boolean, isAsked: boolean }} Read */

/** The parameters of a run. What their state is like is read for the rows in view, one after the other. */
export class Parameters {
  /** @type {any[]} */
  #rows = []
  /** @type {any[]} */
  #inView = []
  /** @type {Map<number, Read>} */
  #reads = new Map()
  /** The run's step at the last look. */
  #step = -1
  #run
  #table
  #count = h('span', { class: 'quiet', role: 'status' })
  #filter = h('input', { type: 'search', 'aria-label': 'Filter parameters by name', placeholder: 'Filter by name' })

  /** @param {string} run */
  constructor(run) {
    this.#run = run
    this.#table = new VirtualTable('Parameters', this.#columns(), (rows) => {
      this.#inView = rows
    })
    this.#filter.addEventListener('input', () => this.#show())
    this.element = h('div', {}, h('div', { class: 'row' }, this.#filter, this.#count), this.#table.element)
  }

  element

  /**
   * Loads the rows, and keeps those in view up to date while `isShown`.
   * @param {AbortSignal} signal
   * @param {{ isShown: () => boolean, step: () => number }} page
   */
  async live(signal, { isShown, step }) {
    while (!isShown()) await sleep(REFRESH_MS / 10, signal)
    for (let total = 1; this.#rows.length < total; ) {
      const page = await this.#fetch(this.#rows.length, signal)
      total = page.total
      this.#rows.push(...page.parameters)
      this.#show(total)
    }
    for (;;) {
      await sleep(REFRESH_MS, signal)
      if (!isShown()) continue
      if (step() !== this.#step) await this.#renew(signal)
      this.#step = step()
      await this.#readStates(signal)
    }
  }

  /**
   * @param {number} offset
   * @param {AbortSignal} signal
   */
  #fetch(offset, signal) {
    return get(`v1/runs/${this.#run}/parameters?offset=${offset}&limit=${PAGE}`, { signal })
  }

  #show(total = this.#rows.length) {
    const wanted = this.#filter.value.toLowerCase()
    const rows = this.#rows.filter(({ name }) => name.toLowerCase().includes(wanted))
    const loaded = this.#rows.length < total ? `, ${count(this.#rows.length)} loaded` : ''
    setText(
      this.#count,
      wanted === '' ? `${count(total)} parameters${loaded}` : `${count(rows.length)} of ${count(total)}${loaded}`,
    )
    this.#table.setRows(rows)
  }

  /**
   * Asks for the pages again that the rows in view are of.
   * @param {AbortSignal} signal
   */
  async #renew(signal) {
    const pages = new Set(this.#inView.map(({ index }) => Math.floor(index / PAGE)))
    // Rows that are sorted by a value lie anywhere: the first few pages are renewed, and the others in later turns.
    for (const page of [...pages].slice(0, 3)) {
      const { parameters } = await this.#fetch(page * PAGE, signal)
      for (const parameter of parameters) Object.assign(this.#rows[parameter.index], parameter)
    }
    this.#table.refresh()
  }

  /** @param {AbortSignal} signal */
  async #readStates(signal) {
    const now = performance.now()
    const due = this.#inView.filter(({ index, state_bytes }) => {
      const read = this.#reads.get(index)
      if (state_bytes === 0 || (state_bytes > READ_BYTES && !read?.isAsked)) return false
      return read === undefined || read.rms === undefined || now - read.at > STATE_MS
    })
    for (const row of due) await this.#read(row, signal)
  }

  /**
   * @param {any} row
   * @param {AbortSignal} [signal]
   */
  async #read(row, signal) {
    const read = this.#reads.get(row.index) ?? { at: 0, isReading: false, isAsked: false }
    this.#reads.set(row.index, read)
    if (read.isReading) return
    read.isReading = true
    try {
      const { state } = await get(`v1/runs/${this.#run}/parameters/${row.index}`, { signal })
      read.rms = state.map((/** @type {any} */ { name, rms }) => `${short(name)} ${number(rms)}`).join(' · ')
      read.at = performance.now()
    } catch (error) {
      // Others may have the memory, or the readers' places: it is asked for again later.
      if (!(error instanceof Problem)) throw error
    } finally {
      read.isReading = false
      this.#table.refresh()
    }
  }

  /** @returns {import('./table.js').Column<any>[]} */
  #columns() {
    const lastRms = (/** @type {any} */ { last }) => last?.update_rms
    return [
      { head: 'Parameter', width: 'minmax(12rem, 2.2fr)', text: ({ name }) => name, by: ({ name }) => name },
      {
        head: 'Shape',
        width: 'minmax(6rem, 1fr)',
        text: ({ shape }) => shape.join(' × ') || 'scalar',
        by: ({ shape }) => product(shape),
      },
      { head: 'Algorithm', width: '6.5rem', text: ({ algorithm }) => algorithm, by: ({ algorithm }) => algorithm },
      { head: 'Layout', width: 'minmax(7rem, 1fr)', text: ({ plan }) => layoutOf(plan) },
      {
        head: 'State',
        width: '5.5rem',
        figure: true,
        text: ({ state_bytes }) => bytes(state_bytes),
        by: ({ state_bytes }) => state_bytes,
      },
      {
        head: 'State RMS',
        width: 'minmax(16rem, 2fr)',
        text: () => '',
        render: (cell, row) => this.#stateCell(cell, row),
      },
      {
        head: 'Gradient norm',
        width: '7rem',
        figure: true,
        text: ({ last }) => number(last?.gradient_norm),
        by: ({ last }) => last?.gradient_norm,
      },
      { head: 'Update RMS', width: '6.5rem', figure: true, text: (row) => number(lastRms(row)), by: lastRms },
    ]
  }

  /**
   * @param {HTMLElement} cell
   * @param {any} row
   */
  #stateCell(cell, row) {
    const read = this.#reads.get(row.index)
    const asks = row.state_bytes > READ_BYTES && !read?.isAsked
    if (!asks) return setText(cell, read?.rms ?? (row.state_bytes === 0 ? '–' : '…'))
    const before = cell.firstElementChild
    if (before instanceof HTMLElement && before.dataset.index === String(row.index)) return
    const ask = () => {
      this.#reads.set(row.index, { at: 0, isReading: false, isAsked: true })
      void this.#read(row).catch(() => {})
    }
    const button = h('button', { type: 'button', class: 'small', 'data-index': row.index, onclick: ask }, 'Read')
    button.setAttribute('aria-label', `Read the state of ${row.name}`)
    cell.replaceChildren(button)
  }
}

/** @param {number[]} shape */
function product(shape) {
  return shape.reduce((size, dimension) => size * dimension, 1)
}

/**
 * @param {{ blocks: { count: number, rows: number, cols: number }[] }} plan
 * @returns {string}
 */
function layoutOf({ blocks }) {
  if (blocks.length === 0) return 'elements'
  return blocks.map(({ count, rows, cols }) => `${count === 1 ? '' : `${count} of `}${rows}×${cols}`).join(', ')
}

/** @param {string} name of a state tensor */
function short(name) {
  return name === 'momentum_buffer' ? 'momentum' : name
}
