import { Charts } from './charts.js'
import { h, setText } from './dom.js'
import { ago, bytes, clock, count, dateTime, number, rate, seconds } from './format.js'
import { Parameters } from './parameters.js'
import { statusOf } from './runs.js'
import { events, get, Problem, post } from './service.js'
import { VirtualTable } from './table.js'
import { tabs } from './tabs.js'
import { sleep } from './wait.js'

/** Between two looks at what no event tells. */
const REFRESH_MS = 2000
const RECONNECT_MS = 1000
/** Receipts that the page begins with. */
const FIRST_RECEIPTS = 1000
const MOST_RECEIPTS = 5000

/**
 * The page of one run.
 * @param {string} name
 */
export function runPage(name) {
  const page = new RunPage(name)
  return { element: page.element, live: (/** @type {AbortSignal} */ signal) => page.live(signal) }
}

class RunPage {
  #name
  #path
  /** @type {any[]} */
  #receipts = []
  #facts = h('dl', { class: 'tiles' })
  #status = h('span', { class: 'pill quiet' }, '…')
  #stream = h('span', { class: 'quiet', role: 'status' })
  #note = h('p', { class: 'notice', hidden: true })
  #charts = new Charts()
  #parameters
  #table = new VirtualTable('Receipts, newest first', receiptColumns())
  #checkpoints
  #members = h('div')
  #refusals = h('div')
  #groups = h('div')
  #tabs

  /** @param {string} name */
  constructor(name) {
    this.#name = name
    this.#path = `v1/runs/${encodeURIComponent(name)}`
    this.#parameters = new Parameters(encodeURIComponent(name))
    this.#checkpoints = new Checkpoints(this.#path)
    const panels = /** @type {[string, HTMLElement][]} */ ([
      ['Parameters', this.#parameters.element],
      ['Receipts', this.#table.element],
      ['Checkpoints', this.#checkpoints.element],
      ['Members', this.#members],
      ['Errors', this.#refusals],
      ['Hyperparameters', this.#groups],
    ])
    this.#tabs = tabs('About this run', panels, (shown) => shown === 'Receipts' && this.#showReceipts())
    const title = h('div', { class: 'row title' }, h('h1', {}, name), this.#status, this.#stream)
    this.element = h(
      'div',
      {},
      ...[h('p', { class: 'crumbs' }, h('a', { href: '#/' }, 'Runs'), ' / ', name), title, this.#note, this.#facts],
      ...[h('h2', { class: 'unseen' }, 'Charts'), this.#charts.element, this.#tabs.element],
    )
  }

  element

  /** @param {AbortSignal} signal */
  async live(signal) {
    await this.#look(signal)
    await Promise.all([
      this.#charts.live(signal),
      this.#lookAgain(signal),
      this.#follow(signal),
      this.#parameters.live(signal, { isShown: () => this.#tabs.shown === 'Parameters', step: () => this.#step }),
    ])
  }

  get #step() {
    return this.#receipts.length === 0 ? 0 : this.#receipts[this.#receipts.length - 1].step
  }

  /** @param {AbortSignal} signal */
  async #lookAgain(signal) {
    for (;;) {
      await sleep(REFRESH_MS, signal)
      await this.#look(signal)
    }
  }

  /** @param {AbortSignal} signal */
  async #look(signal) {
    const run = await get(this.#path, { signal })
    const { text, kind } = statusOf(run, Date.now())
    setText(this.#status, text)
    this.#status.className = `pill ${kind}`
    this.#note.hidden = !run.note
    setText(this.#note, run.note ?? '')
    fill(this.#facts, factsOf(run))
    this.#showGroups(run.groups)
    this.#showMembers(run.members)
    if (!run.in_memory)
      throw new Problem(409, {
        detail:
          'This run is on the disk. Its page shows it once a trainer opens it: to look at more would bring it back to memory.',
      })
    const [{ refusals }] = await Promise.all([
      get(`${this.#path}/refusals`, { signal }),
      this.#checkpoints.look(signal),
    ])
    this.#tabs.label('Checkpoints', this.#checkpoints.count)
    this.#showRefusals(refusals)
  }

  /**
   * Follows the event stream. Where that ends, it goes on after the last receipt that has come.
   * @param {AbortSignal} signal
   */
  async #follow(signal) {
    const { step } = await get(this.#path, { signal })
    let after = Math.max(0, step - FIRST_RECEIPTS)
    for (;;) {
      try {
        for await (const { name, data } of events(encodeURIComponent(this.#name), { after, signal })) {
          setText(this.#stream, 'live')
          if (name === 'receipt') this.#take(data)
          else if (name === 'refused' || name === 'member') await this.#look(signal)
          after = Math.max(after, this.#step)
        }
      } catch (error) {
        if (error instanceof Problem && [401, 403, 404].includes(error.status)) throw error
        if (signal.aborted) throw error
      }
      setText(this.#stream, 'reconnecting…')
      await sleep(RECONNECT_MS, signal)
    }
  }

  /** @param {any} receipt */
  #take(receipt) {
    while (this.#step >= receipt.step) this.#receipts.pop()
    this.#receipts.push(receipt)
    if (this.#receipts.length > MOST_RECEIPTS) this.#receipts.shift()
    this.#charts.push(receipt)
    this.#queue()
  }

  #isQueued = false

  /** The table is drawn once for all receipts that come in one turn, and not at all while nobody sees it. */
  #queue() {
    if (this.#isQueued) return
    this.#isQueued = true
    setTimeout(() => {
      this.#isQueued = false
      if (this.#tabs.shown === 'Receipts') this.#showReceipts()
    }, 250)
  }

  #showReceipts() {
    this.#table.setRows([...this.#receipts].reverse())
  }

  /** @param {{ rank: number, connected: boolean, ended: boolean }[] | undefined} members */
  #showMembers(members) {
    const rows = (members ?? []).map(({ rank, connected, ended }) => [
      String(rank),
      connected ? 'connected' : 'gone',
      ended ? 'has ended its part' : connected ? 'is awaited' : '–',
    ])
    this.#tabs.label('Members', rows.length)
    list(this.#members, {
      heads: ['Rank', 'Connection', 'Step in progress'],
      rows,
      empty: 'One connection sends this run; it has no named members.',
    })
  }

  /** @param {any[]} refusals */
  #showRefusals(refusals) {
    const rows = refusals.map(({ at, code, message, step, parameter }) => [
      dateTime(at),
      code,
      message,
      step === undefined ? '–' : String(step),
      parameter === undefined ? '–' : String(parameter),
    ])
    this.#tabs.label('Errors', rows.length)
    list(this.#refusals, {
      heads: ['Time', 'Code', 'Message', 'Step', 'Parameter'],
      rows: rows.reverse(),
      empty: 'No connection of this run was told an error.',
    })
  }

  /** @param {Record<string, Record<string, unknown>>} groups */
  #showGroups(groups) {
    const names = [...new Set(Object.values(groups).flatMap((values) => Object.keys(values)))]
    const rows = names.map((name) => [name, ...Object.values(groups).map((values) => shown(values[name]))])
    list(this.#groups, { heads: ['Hyperparameter', ...Object.keys(groups)], rows, empty: 'No groups.' })
  }
}

/** Checkpoints of a run, and the button that takes one. */
class Checkpoints {
  #path
  #tag = h('input', { id: 'tag', maxlength: 128, placeholder: 'Tag (optional)', 'aria-label': 'Tag of the checkpoint' })
  #said = h('span', { role: 'status' })
  #list = h('div')
  #button = h('button', { type: 'submit', class: 'primary' }, 'Take a checkpoint')
  #form
  count = 0

  /** @param {string} path */
  constructor(path) {
    this.#path = `${path}/checkpoints`
    this.#form = h(
      'form',
      { class: 'row', onsubmit: (/** @type {Event} */ event) => this.#take(event) },
      this.#tag,
      this.#button,
      this.#said,
    )
    this.element = h('div', {}, this.#form, this.#list)
  }

  element

  /** @param {AbortSignal} [signal] */
  async look(signal) {
    const { checkpoints, reason } = await get(this.#path, { signal })
    this.#form.hidden = reason !== undefined
    this.count = checkpoints.length
    const rows = checkpoints.map(
      (/** @type {any} */ { checkpoint, step, tags, bytes: size, written_at, branch, in_history, problem }) => [
        checkpoint,
        count(step),
        tags.join(', ') || '–',
        bytes(size),
        dateTime(written_at),
        problem ?? (in_history ? `branch ${branch}` : `branch ${branch}, left`),
      ],
    )
    list(this.#list, {
      heads: ['Checkpoint', 'Step', 'Tags', 'Size', 'Written', 'History'],
      rows: rows.reverse(),
      empty: reason ?? 'No checkpoint yet.',
    })
  }

  /** @param {Event} event */
  async #take(event) {
    event.preventDefault()
    this.#button.disabled = true
    setText(this.#said, 'Waiting for the end of the step…')
    try {
      const tag = this.#tag.value.trim()
      const { step } = await post(this.#path, tag === '' ? {} : { tag })
      setText(this.#said, `Step ${count(step)} is on the disk.`)
      this.#tag.value = ''
      await this.look()
    } catch (error) {
      setText(this.#said, error instanceof Error ? error.message : String(error))
    } finally {
      this.#button.disabled = false
    }
  }
}

/** @returns {import('./table.js').Column<any>[]} */
function receiptColumns() {
  const clipped = (/** @type {any} */ { clipped_heads }) =>
    Object.values(clipped_heads).reduce((sum, heads) => sum + heads, 0)
  return [
    { head: 'Step', width: '5.5rem', figure: true, text: ({ step }) => count(step) },
    { head: 'Finished', width: '5.5rem', text: ({ measured }) => clock(measured?.finished_at) },
    { head: 'Applied', width: '4.5rem', figure: true, text: ({ applied }) => count(applied) },
    { head: 'Skipped', width: '4.5rem', figure: true, text: ({ skipped }) => count(skipped) },
    { head: 'Gradient norm', width: '7rem', figure: true, text: ({ gradient_norm }) => number(gradient_norm) },
    { head: 'Update RMS', width: '6.5rem', figure: true, text: ({ measured }) => number(measured?.update_rms) },
    { head: 'Largest logit', width: '6.5rem', figure: true, text: ({ max_logit }) => number(max_logit) },
    { head: 'Clipped', width: '4.5rem', figure: true, text: (row) => count(clipped(row)) },
    { head: 'Wall clock', width: '5.5rem', figure: true, text: ({ measured }) => seconds(measured?.wall_seconds) },
    { head: 'Durable', width: '4.5rem', text: ({ durable }) => (durable ? 'yes' : 'no') },
    { head: 'Digest', width: 'minmax(8rem, 1fr)', text: ({ digest }) => digest },
  ]
}

/**
 * @param {any} run
 * @returns {[string, string][]}
 */
function factsOf(run) {
  return [
    ['Step', count(run.step)],
    ['Rate', rate(run.step_seconds)],
    ['Last step', ago(run.last_step_at, Date.now())],
    ['Durable step', count(run.durable_step)],
    ['State', run.in_memory ? bytes(run.state_bytes) : 'on disk'],
    ['Parameters', count(run.parameters)],
    ['Opened', `${count(run.epoch)} ×`],
    ['Digest', run.digest.slice(0, 10)],
  ]
}

/**
 * @param {HTMLElement} facts
 * @param {[string, string][]} entries
 */
function fill(facts, entries) {
  if (facts.childElementCount === 0)
    facts.append(...entries.map(([label]) => h('div', {}, h('dt', {}, label), h('dd', {}, h('span')))))
  entries.forEach(([, text], i) => {
    const value = facts.children[i].querySelector('span')
    if (value) setText(value, text)
  })
}

/**
 * What each place has, in JSON.
 * @type {WeakMap<HTMLElement, string>}
 */
const listed = new WeakMap()

/**
 * A short table, made anew only where it changes.
 * @param {HTMLElement} place
 * @param {{ heads: string[], rows: string[][], empty: string }} content
 */
function list(place, { heads, rows, empty }) {
  const content = JSON.stringify([heads, rows, empty])
  if (listed.get(place) === content) return
  listed.set(place, content)
  if (rows.length === 0) return place.replaceChildren(h('p', { class: 'empty' }, empty))
  const head = h('tr', {}, ...heads.map((text) => h('th', { scope: 'col' }, text)))
  const body = rows.map(([first, ...rest]) =>
    h('tr', {}, h('th', { scope: 'row' }, first), ...rest.map((text) => h('td', {}, text))),
  )
  const table = h('table', {}, h('thead', {}, head), h('tbody', {}, ...body))
  place.replaceChildren(h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': heads[0] }, table))
}

/** @param {unknown} value of a hyperparameter */
function shown(value) {
  if (value === undefined) return ''
  return typeof value === 'number' ? number(value) : typeof value === 'string' ? value : JSON.stringify(value)
}
