import { h, setText } from './dom.js'
import { ago, bytes, count, rate } from './format.js'
import { get, metrics } from './service.js'
import { sleep } from './wait.js'

const REFRESH_MS = 2000
/** A run whose last step is older than so many of its steps, and than STILL_MS, trains no more. */
const STILL_STEPS = 5
const STILL_MS = 5000

/** The list of runs and what the service uses. */
export function runsPage() {
  const tiles = h('dl', { class: 'tiles' })
  const body = h('tbody')
  const empty = h('p', { class: 'empty', hidden: true }, 'No runs yet. A trainer makes one when it opens it.')
  const heads = ['Run', 'Status', 'Step', 'Rate', 'Last step', 'Durable step', 'Parameters', 'State']
  const table = h(
    'div',
    { class: 'scroll', tabindex: 0, role: 'region', 'aria-labelledby': 'runs-title', hidden: true },
    h(
      'table',
      {},
      h('thead', {}, h('tr', {}, ...heads.map((head, i) => h('th', { scope: 'col', class: i > 1 && 'figure' }, head)))),
      body,
    ),
  )
  const element = h('div', {}, h('h1', { id: 'runs-title' }, 'Runs'), tiles, table, empty)
  const draw = drawer({ tiles, body, empty, table })
  return {
    element,
    /** @param {AbortSignal} signal */
    async live(signal) {
      const capabilities = await get('v1/capabilities', { signal })
      for (;;) {
        const [list, samples] = await Promise.all([
          get('v1/runs', { signal }),
          // A key may see its runs and not the whole service.
          metrics(signal).catch(() => undefined),
        ])
        draw(list, capabilities, samples)
        await sleep(REFRESH_MS, signal)
      }
    },
  }
}

/** @param {{ tiles: HTMLElement, body: HTMLElement, empty: HTMLElement, table: HTMLElement }} parts */
function drawer({ tiles, body, empty, table }) {
  /** @type {{ at: number, samples: Map<string, number> } | undefined} */
  let before
  /** @type {Map<string, HTMLTableRowElement>} */
  const rows = new Map()
  /** @type {Map<string, HTMLElement>} */
  const values = new Map()
  return (
    /** @type {{ runs: any[], stored: any[], wholes?: any[] }} */ { runs, stored, wholes = [] },
    /** @type {any} */ capabilities,
    /** @type {Map<string, number> | undefined} */ samples,
  ) => {
    const now = performance.now()
    for (const tile of tilesOf({ runs, capabilities, samples, before, now })) place(tiles, values, tile)
    if (samples) before = { at: now, samples }
    const listed = [...wholes.map(rowOfWhole), ...runs.map(rowOfRun), ...stored.map(rowOfStored)]
    for (const [name, row] of rows) if (!listed.some((other) => other.name === name)) row.remove()
    for (const { name, kind, cells } of listed) {
      const row = rows.get(name) ?? newRow(name, kind, cells.length)
      rows.set(name, row)
      cells.forEach(([text, kind], i) => {
        setCell(row.cells[i + 1], text, kind)
      })
      if (row.parentNode !== body || body.children[listed.findIndex((other) => other.name === name)] !== row)
        body.append(row)
    }
    table.hidden = listed.length === 0
    empty.hidden = listed.length > 0
  }
}

/**
 * @param {string} name
 * @param {string} kind of page
 * @param {number} cells
 */
function newRow(name, kind, cells) {
  const link = h('a', { href: `#/${kind}/${encodeURIComponent(name)}` }, name)
  const rest = Array.from({ length: cells }, (_, i) => h('td', { class: i > 0 && 'figure' }))
  return h('tr', {}, h('th', { scope: 'row' }, link), ...rest)
}

/**
 * @param {HTMLElement} cell
 * @param {string} text
 * @param {string} [kind] of a pill
 */
function setCell(cell, text, kind) {
  if (!kind) return setText(cell, text)
  if (cell.textContent !== text) cell.replaceChildren(h('span', { class: `pill ${kind}` }, text))
}

/**
 * @param {any} run
 * @returns {{ name: string, kind: string, cells: [string, string?][] }}
 */
function rowOfRun(run) {
  const status = statusOf(run, Date.now())
  return {
    name: run.name,
    kind: 'runs',
    cells: [
      [status.text, status.kind],
      [count(run.step)],
      [status.text === 'training' ? rate(run.step_seconds) : '–'],
      [ago(run.last_step_at, Date.now())],
      [count(run.durable_step)],
      [count(run.parameters)],
      [run.in_memory ? bytes(run.state_bytes) : '–'],
    ],
  }
}

/**
 * A run over several processes of which this one is the head; its shards are rows of their processes.
 * @param {{ name: string, step: number, shards: number, parameters: number }} whole
 * @returns {{ name: string, kind: string, cells: [string, string?][] }}
 */
function rowOfWhole({ name, step, shards, parameters }) {
  const cells = /** @type {[string, string?][]} */ ([[`${shards} shards`, 'quiet'], [count(step)], ['–'], ['–'], ['–']])
  return { name, kind: 'shards', cells: [...cells, [count(parameters)], ['–']] }
}

/**
 * @param {{ name: string, status: string, detail?: string }} stored
 * @returns {{ name: string, kind: string, cells: [string, string?][] }}
 */
function rowOfStored({ name, status }) {
  const rest = Array.from({ length: 6 }, () => /** @type {[string]} */ (['–']))
  return { name, kind: 'runs', cells: [[status, status === 'unreadable' ? 'bad' : 'quiet'], ...rest] }
}

/**
 * What a run does.
 * @param {{ in_memory: boolean, connected: boolean, last_step_at?: string, step_seconds?: number }} run
 * @param {number} now milliseconds since 1970
 */
export function statusOf({ in_memory, connected, last_step_at, step_seconds = 0 }, now) {
  if (!in_memory) return { text: 'on disk', kind: 'quiet' }
  if (!connected) return { text: 'no trainer', kind: 'quiet' }
  const still = Math.max(STILL_MS, STILL_STEPS * step_seconds * 1000)
  if (last_step_at && now - Date.parse(last_step_at) < still) return { text: 'training', kind: 'good' }
  return { text: 'waiting', kind: 'warn' }
}

/** @typedef {{ label: string, text: string, detail?: string, share?: number }} Tile */

/**
 * @param {{ runs: any[], capabilities: any, samples: Map<string, number> | undefined,
 *   before: { at: number, samples: Map<string, number> } | undefined, now: number }} known
 * @returns {Tile[]}
 */
function tilesOf({ runs, capabilities: { devices, limits }, samples, before, now }) {
  const resident = runs.filter(({ in_memory }) => in_memory).length
  const tiles = [
    { label: 'Device', text: devices.map((/** @type {{ name: string }} */ { name }) => name).join(', ') },
    {
      label: 'Runs in memory',
      text: String(resident),
      detail: `of ${limits.max_runs}`,
      share: resident / limits.max_runs,
    },
  ]
  if (!samples) return tiles
  const read = (/** @type {string} */ name) => samples.get(`muond_${name}`) ?? 0
  const perSecond = (/** @type {string} */ name) =>
    before ? ((read(name) - (before.samples.get(`muond_${name}`) ?? 0)) / (now - before.at)) * 1000 : 0
  const [state, used, capacity] = [
    read('state_bytes'),
    read('staging_bytes{state="used"}'),
    read('staging_bytes{state="capacity"}'),
  ]
  return [
    ...tiles,
    {
      label: 'State',
      text: bytes(state),
      detail: `of ${bytes(limits.state_bytes)}`,
      share: state / limits.state_bytes,
    },
    { label: 'Staging', text: bytes(used), detail: `of ${bytes(capacity)}`, share: used / capacity },
    { label: 'Steps', text: before ? `${Number(perSecond('steps_total').toPrecision(3))}/s` : '–' },
    { label: 'Gradients in', text: before ? `${bytes(perSecond('received_bytes_total'))}/s` : '–' },
    { label: 'Updates out', text: before ? `${bytes(perSecond('sent_bytes_total'))}/s` : '–' },
    { label: 'Connections', text: String(read('connections')), detail: `of ${limits.max_connections}` },
  ]
}

/**
 * @param {HTMLElement} tiles
 * @param {Map<string, HTMLElement>} values
 * @param {Tile} tile
 */
function place(tiles, values, { label, text, detail, share }) {
  const value = values.get(label) ?? h('span')
  if (!values.has(label)) {
    const meter = share === undefined ? null : h('meter', { min: 0, max: 1, high: 0.9, 'aria-label': label })
    tiles.append(h('div', {}, h('dt', {}, label), h('dd', {}, value, detail && h('small', {}, detail), meter)))
    values.set(label, value)
  }
  setText(value, text)
  const meter = value.parentElement?.querySelector('meter')
  if (meter && share !== undefined) meter.value = share
}
