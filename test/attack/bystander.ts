import { readFileSync } from 'node:fs'
import { request } from 'node:http'
import { setTimeout as delay } from 'node:timers/promises'
import { connect, MuondError } from '../../src/client/client.js'

// It does nothing wrong while its parent attacks: it trains, asks for /livez and looks at the service's memory.

/** Whom it watches; `pid` is the service's. */
export type Watched = { url: string; pid: number; token: string }

/** What was seen since the last report. */
export type Seen = { rss: number; most: number; livezMs: number; steps: number; seconds: number; problem: string }

const POLL_MS = 20
const PAGE_BYTES = 4096
const ELEMENTS = 4096
const LIVEZ_TIMEOUT_MS = 30_000

const { url, pid, token }: Watched = JSON.parse(process.argv[2] ?? '')
const state = { most: 0, livezMs: 0, steps: 0, since: performance.now(), problem: '' }
/** When /livez was asked that has not answered yet. */
let asked = Infinity
const stop = new AbortController()

process.on('message', (message: 'report' | 'stop') => {
  if (message === 'stop') return stop.abort()
  const rss = rssOf(pid)
  const seconds = (performance.now() - state.since) / 1000
  const { steps, problem } = state
  const livezMs = Math.max(state.livezMs, performance.now() - asked)
  const seen: Seen = { rss, most: Math.max(rss, state.most), livezMs, steps, seconds, problem }
  Object.assign(state, { most: 0, livezMs: 0, steps: 0, since: performance.now() })
  process.send?.(seen)
})
await Promise.all([watchMemory(), watchLivez(), train()])
process.disconnect()

async function watchMemory(): Promise<void> {
  while (!stop.signal.aborted) {
    state.most = Math.max(state.most, rssOf(pid))
    await delay(POLL_MS)
  }
}

async function watchLivez(): Promise<void> {
  while (!stop.signal.aborted) {
    asked = performance.now()
    await livez()
    state.livezMs = Math.max(state.livezMs, performance.now() - asked)
    asked = Infinity
    await delay(POLL_MS)
  }
}

/** A connection of its own each time, as supervisors make them. */
function livez(): Promise<void> {
  return new Promise((resolve) => {
    const outgoing = request(`${url}/livez`, { agent: false, timeout: LIVEZ_TIMEOUT_MS })
    outgoing.on('response', (response) => response.resume().once('end', resolve))
    outgoing.on('timeout', () => outgoing.destroy(new Error('no answer')))
    outgoing.on('error', (error) => {
      state.problem ||= `/livez: ${error.message}`
      resolve()
    })
    outgoing.end()
  })
}

async function train(): Promise<void> {
  const client = await connect(url.replace('http', 'ws'), { token, transport: 'websocket' })
  const data = new Float32Array(ELEMENTS).fill(1)
  const run = await client.open({
    run: 'bystander',
    groups: [{ name: 'g', algorithm: 'adamw', lr: 0.001 }],
    parameters: [{ name: 'w', shape: [ELEMENTS], group: 'g', data }],
  })
  const gradient = new Float32Array(ELEMENTS).fill(0.5)
  process.send?.('trains')
  while (!stop.signal.aborted) {
    try {
      await run.step({ w: gradient })
      state.steps += 1
    } catch (error) {
      state.problem ||= error instanceof MuondError ? `${error.code}: ${error.message}` : String(error)
      break
    }
  }
  await client.close()
}

function rssOf(process: number): number {
  try {
    return Number(readFileSync(`/proc/${process}/statm`, 'utf8').split(' ')[1]) * PAGE_BYTES
  } catch {
    state.problem ||= 'the service has ended'
    return 0
  }
}
