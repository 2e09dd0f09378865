import { Random } from './random.js'
import type { Moment, Weather } from './world.js'

/** Faults end by then, in milliseconds of the simulated clock. */
export const CALM_MS = 60_000

/**
 * What goes wrong from `at` on for so many milliseconds. A strike waits for the first moment of its kind after `at`,
 * and hits the process whose doing it is: what it has asked for is done, and it does not know.
 */
export type Fault = { readonly at: number; readonly lasts: number } & (
  | { readonly kind: 'strike'; readonly how: 'kill' | 'stop'; readonly moment: Moment }
  | { readonly kind: 'kill' | 'stop'; readonly process: number }
  | { readonly kind: 'cut'; readonly side: readonly string[]; readonly isOneWay: boolean }
  | { readonly kind: 'refuse' | 'late'; readonly store: 'log' | 'coordinator' | 'store' }
)

/** A simulation from its beginning: who there is, how the network is, and what goes wrong when. */
export type Schedule = {
  readonly seed: number
  readonly processes: number
  readonly shards: number
  readonly steps: number
  readonly journal: boolean
  /**
   * Whether a coordinator and shared stores have shards move away from processes that are gone; else each has its own
   * process, whose disk outlives it, and the trainer asks for going back.
   */
  readonly moves: boolean
  readonly weather: Weather
  /** The fraction of checkpoints that come to nothing. */
  readonly forgets: number
  readonly faults: readonly Fault[]
}

const MOMENTS = ['assign', 'begin', 'back', 'commit', 'journal', 'checkpoint'] as const satisfies readonly Moment[]
const STORES = ['log', 'coordinator', 'store'] as const

/** The schedule of a seed. One in fifty has 64 shards. */
export function scheduleOf(seed: number, moves = true): Schedule {
  const random = new Random(seed)
  const shards = random.chance(0.02) ? 64 : random.one([1, 2, 2, 3, 4, 8])
  const processes = random.whole(Math.min(2, shards), Math.min(shards, 8)) + random.whole(0, 2)
  const isFair = random.chance(0.3)
  const weather = {
    delay: random.one([5, 20, 200]),
    loss: isFair ? 0 : random.fraction() * 0.1,
    twice: isFair ? 0 : random.fraction() * 0.1,
  }
  const places = [...Array.from({ length: processes }, (_, i) => `p${i}`), ...STORES, 'trainer']
  const faults = Array.from({ length: random.whole(0, 8) }, () => faultOf(random, places, processes))
  const [steps, journal, forgets] = [random.whole(3, 12), random.chance(0.5), random.one([0, 0.1, 0.3])]
  return { seed, processes, shards, steps, journal, moves, weather, forgets, faults }
}

function faultOf(random: Random, places: readonly string[], processes: number): Fault {
  const at = random.whole(0, 45_000)
  const lasts = random.one([300, 3000, 15_000, 40_000]) * (0.5 + random.fraction())
  const when = { at, lasts: Math.round(Math.min(lasts, CALM_MS - at)) }
  const kind = random.one(['kill', 'kill', 'stop', 'stop', 'strike', 'strike', 'cut', 'cut', 'refuse', 'late'] as const)
  switch (kind) {
    case 'strike':
      return { ...when, kind, how: random.one(['kill', 'stop']), moment: random.one(MOMENTS) }
    case 'kill':
    case 'stop':
      return { ...when, kind, process: random.whole(0, processes - 1) }
    case 'cut':
      return { ...when, kind, side: places.filter(() => random.chance(0.4)), isOneWay: random.chance(0.3) }
    default:
      return { ...when, kind, store: random.one(STORES) }
  }
}

/** A few words on a schedule and a line for each fault. */
export function describe({
  seed,
  processes,
  shards,
  steps,
  journal,
  moves,
  weather,
  forgets,
  faults,
}: Schedule): string {
  const { delay, loss, twice } = weather
  const where = moves ? '' : ' that they do not leave'
  const what = `seed ${seed}: ${shards} shards on ${processes} processes${where}, ${steps} steps, ${journal ? 'with' : 'without'} a journal`
  const network = `messages take up to ${delay} ms, ${(100 * loss).toFixed(1)} % are lost, ${(100 * twice).toFixed(1)} % come twice`
  const kept = journal ? '' : `, ${100 * forgets} % of the checkpoints come to nothing`
  const lines = [...faults].sort((one, other) => one.at - other.at).map(faultText)
  return [`${what}${kept}`, network, ...lines].join('\n')
}

function faultText(fault: Fault): string {
  const { at, lasts } = fault
  const when = `${(at / 1000).toFixed(3).padStart(8)} s  for ${(lasts / 1000).toFixed(3)} s: `
  switch (fault.kind) {
    case 'kill':
    case 'stop':
      return `${when}${fault.kind} p${fault.process}`
    case 'strike':
      return `${when}${fault.how} whoever has come to the next '${fault.moment}'`
    case 'cut':
      return `${when}cut ${fault.side.join(', ')} off${fault.isOneWay ? ', in one direction' : ''}`
    default:
      return `${when}${fault.store} ${fault.kind === 'refuse' ? 'refuses' : 'is late'}`
  }
}
