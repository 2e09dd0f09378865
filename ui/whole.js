import { h, setText } from './dom.js'
import { bytes, count, dateTime } from './format.js'
import { get } from './service.js'
import { sleep } from './wait.js'

const REFRESH_MS = 2000

/**
 * The page of a run that is spread over several processes, at its head: where its shards are. What a shard does is
 * shown by its own process.
 * @param {string} name
 */
export function wholePage(name) {
  const facts = h('dl', { class: 'tiles' })
  const body = h('tbody')
  const heads = ['Shard', 'Process', 'Parameters', 'State', 'Next step', 'Digest']
  const element = h(
    'div',
    {},
    h('p', { class: 'crumbs' }, h('a', { href: '#/' }, 'Runs'), ' / ', name),
    h('h1', { id: 'whole-title' }, name),
    facts,
    h('h2', { id: 'shards-title' }, 'Shards'),
    h(
      'div',
      { class: 'scroll', tabindex: 0, role: 'region', 'aria-labelledby': 'shards-title' },
      h(
        'table',
        { 'aria-labelledby': 'shards-title' },
        h('thead', {}, h('tr', {}, ...heads.map((head) => h('th', { scope: 'col' }, head)))),
        body,
      ),
    ),
  )
  return {
    element,
    /** @param {AbortSignal} signal */
    async live(signal) {
      for (;;) {
        const whole = await get(`v1/runs/${encodeURIComponent(name)}/shards`, { signal })
        fill(facts, factsOf(whole))
        whole.shards.forEach((/** @type {any} */ shard, /** @type {number} */ i) => {
          showShard(body, i, shard)
        })
        await sleep(REFRESH_MS, signal)
      }
    },
  }
}

/**
 * @param {any} whole
 * @returns {[string, string][]}
 */
function factsOf({ step, shards, head, generation, created_at, digest }) {
  return [
    ['Step', count(step)],
    ['Shards', count(shards.length)],
    [
      'State',
      bytes(shards.reduce((/** @type {number} */ sum, /** @type {any} */ shard) => sum + shard.state_bytes, 0)),
    ],
    ['Head', head],
    ['Created', dateTime(created_at)],
    ['Generation', String(generation)],
    ['Digest', digest.slice(0, 10)],
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
 * @param {HTMLElement} body
 * @param {number} i
 * @param {{ run: string, peer: string, parameters: number[][], state_bytes: number, voted: boolean, digest: string }} shard
 */
function showShard(body, i, { run, peer, parameters, state_bytes, voted, digest }) {
  const held = parameters.reduce((sum, [start, stop]) => sum + stop - start, 0)
  const texts = [peer, count(held), bytes(state_bytes), voted ? 'has ended it' : 'is awaited', digest.slice(0, 10)]
  const row = body.children[i] ?? newRow(body, run, peer, texts.length)
  texts.forEach((text, at) => {
    setText(/** @type {HTMLElement} */ (row.children[at + 1]), text)
  })
}

/**
 * @param {HTMLElement} body
 * @param {string} run
 * @param {string} peer
 * @param {number} cells
 */
function newRow(body, run, peer, cells) {
  const link = h('a', { href: `${peer}/ui#/runs/${encodeURIComponent(run)}` }, run)
  const row = h('tr', {}, h('th', { scope: 'row' }, link), ...Array.from({ length: cells }, () => h('td')))
  body.append(row)
  return row
}
