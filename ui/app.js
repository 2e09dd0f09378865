import { byId, h, setText } from './dom.js'
import { runPage } from './run.js'
import { runsPage } from './runs.js'
import { get, key, Problem } from './service.js'
import { sleep } from './wait.js'
import { wholePage } from './whole.js'

/** How often the header asks whether the service takes steps. */
const HEALTH_MS = 5000
const RETRY_MS = 3000

const main = byId('main', HTMLElement)
const ask = byId('ask', HTMLDialogElement)
const input = byId('ask-key', HTMLInputElement)

/** Ends the page that is shown. */
let leave = new AbortController()

/**
 * Shows the page that the address names: `#/` is the list of runs, `#/runs/NAME` one run, and `#/shards/NAME` one that is
 * spread over several processes.
 */
function show() {
  leave.abort()
  leave = new AbortController()
  const { signal } = leave
  const [, kind, name] = /^#\/(runs|shards)\/(.+)$/.exec(location.hash) ?? []
  const run = name && decodeURIComponent(name)
  document.title = run ? `${run} · muond` : 'muond'
  const page = run ? (kind === 'shards' ? wholePage(run) : runPage(run)) : runsPage()
  main.replaceChildren(page.element)
  page.live(signal).catch((error) => fail(error, signal))
}

/**
 * Says why the page goes on no more. What may be well again later, as after a restart of the service, is tried anew.
 * @param {unknown} error
 * @param {AbortSignal} left
 */
async function fail(error, left) {
  if (left.aborted) return
  if (error instanceof Problem && error.status === 401) return askKey(error.message)
  const isLasting = error instanceof Problem && error.status < 500
  const text = error instanceof Error ? error.message : String(error)
  main.prepend(h('p', { class: 'notice', role: 'alert' }, isLasting ? text : `${text}. Trying again…`))
  if (isLasting) return
  await sleep(RETRY_MS, left).then(show, () => {})
}

/** @param {string} reason why a key is needed; empty where the reader wants to change it */
function askKey(reason) {
  if (ask.open) return
  setText(byId('ask-reason', HTMLElement), reason)
  input.value = ''
  ask.showModal()
}

ask.addEventListener('close', () => {
  if (ask.returnValue === 'use' && input.value !== '') key.set(input.value.trim())
  else if (ask.returnValue === 'forget') key.set('')
  else return
  input.value = ''
  show()
})
byId('key', HTMLButtonElement).addEventListener('click', () => askKey(''))
addEventListener('hashchange', () => {
  // The link that skips the header leads to an element, not to a page.
  if (location.hash !== '' && !location.hash.startsWith('#/')) return
  show()
  main.focus({ preventScroll: true })
  scrollTo(0, 0)
})

async function watchHealth() {
  const health = byId('health', HTMLElement)
  for (;;) {
    const problem = await get('readyz').then(
      () => undefined,
      (error) => error,
    )
    health.className = problem ? 'pill bad' : 'pill good'
    setText(health, problem ? (problem.code ?? 'unreachable') : 'ready')
    health.title = problem?.message ?? 'The service takes steps.'
    await new Promise((resolve) => setTimeout(resolve, HEALTH_MS))
  }
}

async function sayWhere() {
  const { version } = await get('.')
  setText(byId('service', HTMLElement), version)
}

show()
void watchHealth()
sayWhere().catch(() => {})
