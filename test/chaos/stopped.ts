import { setTimeout as delay } from 'node:timers/promises'
import { MuondError } from '../../src/client/client.js'
import { type Durability, Site } from './site.js'
import { type Case, type Fault, judge, lost, type Verdict } from './stage.js'
import type { Outcome } from './trainer.js'
import { startTrainer, type TrainerChild } from './trainer-child.js'

const STOPPED_MS = [50, 400] as const
const SEND_TIMEOUT = 0.5
const PAST_TIMEOUT_MS = 1500
/** Bytes of the gradient in whose middle the client stops. */
const FRAMES_BEFORE = 10

const FENCED =
  "'Fell there' counts the first clients that were told TAKEN_OVER. A client that writes before it reads loses the close that says so, opens the run again and is told STEP_CONFLICT."

type Stop = { site: Site; trainer: TrainerChild; the: Case }

/**
 * SIGSTOP and SIGCONT of the service and of the client, alone and with another client that takes the run in between.
 */
export function stopped(): Fault[] {
  const fault = 'SIGSTOP, SIGCONT'
  return [
    { fault, aimed: 'server', full: 8, attempt: (the) => atAnyFrame(the, stopServer) },
    {
      ...{ fault, aimed: 'server, another client takes over', full: 8, isQuick: true },
      attempt: (the) => atAnyFrame(the, takeFromServer),
    },
    { fault, aimed: 'client', full: 8, attempt: (the) => atAnyFrame(the, stopClient) },
    {
      ...{ fault, aimed: 'client, another takes over', full: 16, isQuick: true, note: FENCED },
      attempt: (the) => atAnyFrame(the, takeFromClient),
    },
    { fault, aimed: 'client, past the send timeout', full: 4, attempt: stopPastTimeout },
  ]
}

/** Trains in a process of its own, and calls back when a random frame passes. */
async function atAnyFrame(the: Case, happen: (stop: Stop) => Promise<Verdict>): Promise<Verdict> {
  const durability: Durability = the.index % 2 === 0 ? 'journal' : 'checkpoint'
  const site = await Site.start({ folder: the.folder, durability })
  const frame = 1 + Math.floor(the.random() * the.reference.frames)
  const passed = framePassed(site, frame)
  const trainer = startTrainer(site, 'run')
  await Promise.race([passed, trainer.ended])
  return happen({ site, trainer, the }).finally(() => site.close())
}

function framePassed(site: Site, frame: number): Promise<void> {
  let seen = 0
  return new Promise((resolve) => {
    site.proxy.meddle = (passing) => {
      seen += 1
      if (seen === frame) resolve()
      return [passing.frame.bytes]
    }
  })
}

function between([least, most]: readonly [number, number], random: () => number): number {
  return least + random() * (most - least)
}

async function stopServer({ site, trainer, the }: Stop): Promise<Verdict> {
  site.server.signal('SIGSTOP')
  await delay(between(STOPPED_MS, the.random))
  site.server.signal('SIGCONT')
  return finish(site, trainer, the)
}

async function stopClient({ site, trainer, the }: Stop): Promise<Verdict> {
  trainer.signal('SIGSTOP')
  await delay(between(STOPPED_MS, the.random))
  trainer.signal('SIGCONT')
  return finish(site, trainer, the)
}

async function finish(site: Site, trainer: TrainerChild, the: Case): Promise<Verdict> {
  const outcome = await trainer.ended
  if (!('weights' in outcome)) return lost(`the trainer ended with ${outcome.code}: ${outcome.message}`)
  return judge(outcome, the.reference, site.durability === 'journal')
}

/** The other client has asked for the run when the service goes on. */
async function takeFromServer({ site, trainer, the }: Stop): Promise<Verdict> {
  site.server.signal('SIGSTOP')
  const other = takeOver(site, trainer, the)
  await delay(between(STOPPED_MS, the.random))
  site.server.signal('SIGCONT')
  return fenced({ site, trainer, the }, await other)
}

/** The first client goes on when the other one is done, or while it trains. */
async function takeFromClient({ site, trainer, the }: Stop): Promise<Verdict> {
  trainer.signal('SIGSTOP')
  // Bytes that were sent already are still on their way.
  await delay(between(STOPPED_MS, the.random))
  const other = takeOver(site, trainer, the)
  if (the.index % 4 < 2) await Promise.race([other, delay(the.random() * the.reference.seconds * 1000)])
  else await other
  trainer.signal('SIGCONT')
  return fenced({ site, trainer, the }, await other)
}

/**
 * Trains past the proxy, from the weights that the first client has reported. Where the first client fences a client
 * off, another one follows.
 */
async function takeOver(site: Site, trainer: TrainerChild, { signal }: Case): Promise<Outcome> {
  const url = site.control().replace('http', 'ws')
  const kept = new Map(trainer.kept)
  try {
    return await site.train('run', signal, { url, kept })
  } catch (error) {
    if (!(error instanceof MuondError) || error.code !== 'TAKEN_OVER') throw error
    await trainer.ended
    return site.train('run', signal, { url, kept })
  }
}

/** The other client trains to the end; the first one is told that it lost the run, unless it had ended before. */
async function fenced({ site, trainer, the }: Stop, outcome: Outcome): Promise<Verdict> {
  const verdict = judge(outcome, the.reference, site.durability === 'journal')
  if (verdict.result === 'lost') return verdict
  const first = await trainer.ended
  if ('weights' in first) return { ...judge(first, the.reference, site.durability === 'journal'), fell: false }
  if (first.code === 'TAKEN_OVER') return { result: 'error', fell: true }
  if (first.code === 'STEP_CONFLICT') return { result: 'error', fell: false }
  return lost(`the first client ended with ${first.code}: ${first.message}, expected TAKEN_OVER or STEP_CONFLICT`)
}

/** Stops the client in the middle of a gradient, for longer than the service waits. */
async function stopPastTimeout(the: Case): Promise<Verdict> {
  const flags = ['--send-timeout-seconds', String(SEND_TIMEOUT)]
  const site = await Site.start({ folder: the.folder, durability: 'journal', flags })
  const step = 1 + Math.floor(the.random() * the.reference.digests.length)
  let passed = 0
  let isTimedOut = false
  const begun = new Promise<void>((resolve) => {
    site.proxy.meddle = async ({ frame, label, direction, link }) => {
      if (label?.type === 'error') isTimedOut = true
      if (isTimedOut || direction === 'down' || label?.type !== 'gradient' || label.step !== step) return [frame.bytes]
      passed += 1
      if (passed <= FRAMES_BEFORE) return [frame.bytes]
      resolve()
      // The proxy keeps what the client had sent already, so that the service sees it stop.
      await link.closed
      return []
    }
  })
  const trainer = startTrainer(site, 'run')
  await begun
  trainer.signal('SIGSTOP')
  await delay(PAST_TIMEOUT_MS)
  trainer.signal('SIGCONT')
  return { ...(await finish(site, trainer, the).finally(() => site.close())), fell: isTimedOut }
}
