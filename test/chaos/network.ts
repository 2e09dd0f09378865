import { setTimeout as delay } from 'node:timers/promises'
import type { MuondError } from '../../src/client/client.js'
import { shorten } from './frames.js'
import type { Passing } from './proxy.js'
import { Site } from './site.js'
import { type Case, type Fault, judge, type Verdict } from './stage.js'
import type { Remedy, Trainer } from './trainer.js'

type Means = {
  random: () => number
  /** Sends the frame behind the next one of its direction. */
  keepBack: () => void
}

/** A fault that is done to a frame; returns the bytes that go on in its place. */
type Trouble = (passing: Passing, means: Means) => Buffer[] | Promise<Buffer[]>

type NetworkFault = { trouble: Trouble; times: number } & Pick<Fault, 'aimed' | 'full' | 'isQuick' | 'note'>

/**
 * A swallowed frame leaves both ends waiting. A connection without frames is cut after so long, sooner than by a
 * network.
 */
const SILENCE_MS = 300
const DELAY_MS = 100
const REFUSALS = 50
const SWALLOWED = `The proxy cuts a connection on which nothing has moved for ${SILENCE_MS} ms after a frame was swallowed, shortened or held back.`

const FAULTS: readonly NetworkFault[] = [
  { aimed: 'cut between frames', trouble: cut, full: 20, times: 3 },
  { aimed: 'cut inside a frame', trouble: cutInside, full: 20, times: 3, isQuick: true },
  { aimed: 'delay', trouble: hold, full: 10, times: 20 },
  { aimed: 'frame dropped', trouble: drop, full: 40, times: 2, isQuick: true, note: SWALLOWED },
  { aimed: 'frame truncated', trouble: truncate, full: 40, times: 2, isQuick: true, note: SWALLOWED },
  { aimed: 'frames reordered', trouble: reorder, full: 40, times: 2, isQuick: true, note: SWALLOWED },
]

/** The faults of a network, or of a proxy with bugs, on frames of both directions. */
export function network(): Fault[] {
  return FAULTS.map(({ trouble, times, ...row }) => {
    let site: Promise<Site> | undefined
    return {
      fault: 'network',
      ...row,
      attempt: async (the) => {
        site ??= Site.start({ folder: the.folder, durability: 'journal' })
        return disturb(await site, the, { trouble, times })
      },
      end: async () => (await site)?.clear(),
    }
  })
}

async function disturb(
  site: Site,
  the: Case,
  { trouble, times }: { trouble: Trouble; times: number },
): Promise<Verdict> {
  const { random, reference, seed, signal } = the
  const chosen = new Set(Array.from({ length: times }, () => anyFrame(the)))
  const seen = new Map<string, number>()
  let struck = 0
  const keptBack = new Map<string, Buffer>()
  site.proxy.meddle = async (passing) => {
    const { frame, link, direction } = passing
    const way = `${link.number} ${direction}`
    const late = keptBack.get(way) ?? []
    keptBack.delete(way)
    const type = passing.label?.type ?? 'control'
    const number = (seen.get(type) ?? 0) + 1
    seen.set(type, number)
    if (!chosen.has(`${type} ${number}`)) return [frame.bytes, late].flat()
    struck += 1
    const keepBack = () => keptBack.set(way, frame.bytes)
    return [...(await trouble(passing, { random, keepBack })), late].flat()
  }
  const outcome = await site.train(`run-${seed}`, signal, { decide })
  site.proxy.rest()
  const verdict = judge(outcome, reference, true)
  if (verdict.result !== 'lost') await site.remove(`run-${seed}`)
  return { ...verdict, fell: struck > 0 }
}

/** A random frame by its type and its number in that type: most frames are gradients, but every type has its turn. */
function anyFrame({ random, reference: { framesByType } }: Case): string {
  const types = [...framesByType]
  const [type, count] = types[Math.floor(random() * types.length)]
  return `${type} ${1 + Math.floor(random() * count)}`
}

/**
 * Asks for the step again, unless the service has begun it with other settings than the client's: then the run goes
 * back.
 */
function decide({ code, fields }: MuondError, { refusals }: Trainer): Remedy {
  if (code === 'INTERNAL' || refusals.length > REFUSALS) return 'give up'
  return code === 'STEP_CONFLICT' && fields.expected_step === undefined ? 'back' : 'again'
}

function cut({ link }: Passing): Buffer[] {
  link.cut()
  return []
}

async function cutInside({ link, frame, direction }: Passing, { random }: Means): Promise<Buffer[]> {
  await link.write(direction, frame.bytes.subarray(0, Math.floor(random() * frame.bytes.length)))
  link.cut()
  return []
}

async function hold({ frame }: Passing, { random }: Means): Promise<Buffer[]> {
  await delay(random() * DELAY_MS)
  return [frame.bytes]
}

function drop({ link }: Passing): Buffer[] {
  link.cutWhenSilent(SILENCE_MS)
  return []
}

function truncate({ frame, link }: Passing, { random }: Means): Buffer[] {
  link.cutWhenSilent(SILENCE_MS)
  return [shorten(frame, Math.floor(random() * frame.payload.length))]
}

function reorder({ link }: Passing, { keepBack }: Means): Buffer[] {
  link.cutWhenSilent(SILENCE_MS)
  keepBack()
  return []
}
