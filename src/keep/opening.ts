import { constants } from 'node:buffer'
import { isDeepStrictEqual } from 'node:util'
import { isBlockDtype, tensorBytes } from '../../kernels/dtype.js'
import type { Principal } from '../access/principal.js'
import type { RunQuotas, RunSize } from '../access/quotas.js'
import type { Config } from '../config.js'
import type { Demand } from '../device/job.js'
import { ServiceError } from '../errors.js'
import { planStep } from '../optimizer/algorithms/algorithm.js'
import { attentionDifference, parseAttentions } from '../optimizer/attention.js'
import { effective, type Group, type Groups, groupOf, show, stateBearing } from '../optimizer/hyperparameters.js'
import {
  allStateBytes,
  findingDifference,
  PARAMETERS_PER_YIELD,
  type Parameter,
  parsingParameters,
  stateBytes,
} from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import { parseGroups } from '../run/declaration.js'
import type { Layout } from '../run/members/layout.js'
import { type Connection, memberId, type Seat } from '../run/members/member.js'
import { seatOf } from '../run/members/seat.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { OpenFrame } from '../wire/frame.js'

// What an `open` asks for, held against the run that is there.

// Of one view of memory.
const { MAX_LENGTH } = constants

/** A place in a run that nothing speaks against: the seat, and the layout that it is one of. */
export type Place = { seat: Seat | undefined; layout: Layout }

/** Every run: in memory, idle, and on the disk in another way. */
type RunTable = {
  list(): readonly Run[]
  readonly idle: ReadonlyMap<string, RunSize>
  readonly stored: ReadonlyMap<string, string>
}

/** Who opens a run; without a principal no quota holds. */
export type Opener = { readonly connection: Connection; readonly principal: Principal | undefined }

/**
 * Counts a run that is about to be made against the quotas of its opener, until the function is called that this
 * returns. Throws OVER_CAPACITY.
 */
export function reserve(quotas: RunQuotas, { principal }: Opener, size: RunSize): () => void {
  return principal ? quotas.reserve(principal, size) : () => {}
}

/** Of a run on the disk that was not read yet nothing is known but its name. */
export const UNKNOWN_SIZE = { parameters: 0, state_bytes: 0 } as const

/** What a run takes once every parameter has taken a step. */
export function sizeOf({ name, parameters }: { name: string; parameters: readonly Parameter[] }): RunSize {
  return { name, parameters: parameters.length, state_bytes: allStateBytes(parameters) }
}

/** What all runs take. */
export function* sizesOf(runs: RunTable): Generator<RunSize> {
  for (const { name, parameters, fullStateBytes } of runs.list())
    yield { name, parameters: parameters.length, state_bytes: fullStateBytes }
  yield* runs.idle.values()
  for (const name of runs.stored.keys()) yield { ...UNKNOWN_SIZE, name }
}

/**
 * Throws RUN_BUSY where a connection has the place in the run that an `open` asks for and it does not ask to replace
 * that, and RUN_MISMATCH where others have the run in another layout.
 */
export function checkFree(run: Run, { member, takeover = false }: OpenFrame): void {
  run.intake.members.checkFree(member, takeover)
}

/**
 * Finds the place that an `open` asks for. Throws PARAMETER_INVALID, and RUN_MISMATCH for ranges that are others now or
 * for weights that are not those of other replicas.
 * Yields from time to time.
 */
export function* findingPlace(run: Run, frame: OpenFrame): Generator<undefined, Place> {
  const seat = yield* seatOf(frame, run.parameters)
  const layout = run.intake.members.layoutFor(seat)
  if (seat) yield* layout.checking(seat)
  // Later the weights of a member that comes are those of another step than the others have told of.
  if (seat && isFresh(run)) layout.checkWeights(seat)
  return { seat, layout }
}

/**
 * Whether an `open` that may only create a run may join it: others have created it for all members, and wait for them.
 */
export function mayJoin(run: Run | undefined, { member }: OpenFrame): boolean {
  if (!run || !member) return false
  const { members } = run.intake
  return members.layout.fits(member) && members.hasOthers(member) && isFresh(run)
}

/** Compares what a resuming `open` gives with what the run has; answers the groups to replace, if any were given. */
export async function checkSame(run: Run, frame: OpenFrame, presets: Presets): Promise<Groups | undefined> {
  const existing = run.groups
  const groups = frame.groups && parseGroups(frame.groups, presets)
  if (groups) {
    const joins = frame.member !== undefined && isFresh(run) && run.intake.members.hasOthers(frame.member)
    const difference = groupDifference(existing, groups, joins)
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.parameters) {
    const given = await inSlices(parsingParameters(frame.parameters, groups ?? existing))
    const difference = await inSlices(findingDifference(run.parameters, given))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.attentions) {
    const difference = attentionDifference(run.attentions, parseAttentions(frame.attentions, run.parameters))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  // Hyperparameters are rank 0's to give, of replica 0.
  return frame.member && memberId(frame.member) > 0 ? undefined : groups
}

/** Whether nothing of a run's first step was applied. */
export function isFresh(run: Run): boolean {
  return run.step === 0 && !run.begun
}

/** `wholly`: of a run that its members are about to begin, every hyperparameter has to be the same. */
function groupDifference(existing: Groups, given: Groups, wholly: boolean): string | undefined {
  for (const [name, group] of existing) {
    const other = given.get(name)
    if (!other) return `its group '${name}' is not given`
    const difference = stateBearing(group, other) ?? (wholly ? valueDifference(group, other) : undefined)
    if (difference) return `group '${name}': ${difference}`
  }
  for (const name of given.keys()) if (!existing.has(name)) return `it has no group '${name}'`
  return undefined
}

function valueDifference(existing: Group, given: Group): string | undefined {
  const [has, other] = [effective(existing), effective(given)]
  const key = Object.keys(has).find((name) => !isDeepStrictEqual(has[name], other[name]))
  return key && `${key} is ${show(has[key])} in the run, ${show(other[key])} given`
}

/** Throws OVER_CAPACITY where a run has more parameters, or larger ones, than the service can have. */
export function checkSizes(parameters: readonly Parameter[], { max_parameters }: Pick<Config, 'max_parameters'>): void {
  const { length } = parameters
  if (length > max_parameters)
    throw new ServiceError('OVER_CAPACITY', `a run holds at most ${max_parameters} parameters, given are ${length}`)
  const large = parameters.find((parameter) => largestTensor(parameter) > MAX_LENGTH)
  if (large === undefined) return
  const message = `parameter '${large.name}' has tensors of ${largestTensor(large)} bytes, node ${process.version} reaches ${MAX_LENGTH}: run the service on a newer one`
  throw new ServiceError('OVER_CAPACITY', message, { parameter: large.index })
}

/** The bytes of the largest tensor of a parameter that travels. */
function largestTensor({ gradient_bytes, update_bytes }: Parameter): number {
  return Math.max(gradient_bytes, update_bytes)
}

/** `scales`: bytes of row scales by parameter. `held`: a checkpoint may hold the state of one step beside the next. */
type Asked = { groups: Groups; scales: ReadonlyMap<number, number>; held: boolean }

/** What a run asks of a device: one step of every parameter. Yields from time to time. */
export function* demandsOf(
  parameters: readonly Parameter[],
  { groups, scales, held }: Asked,
): Generator<undefined, Demand[]> {
  // Parameters that are declared alike share the description of their state (parseParameters), and so their plan.
  const alike = new Map<Parameter['state'], Demand>()
  const demands: Demand[] = []
  for (const parameter of parameters) {
    const { index, state } = parameter
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    const demand = alike.get(state) ?? demandOf(parameter, groups, held)
    alike.set(state, demand)
    const scale = scales.get(index)
    demands.push(scale === undefined ? demand : { ...demand, update_bytes: demand.update_bytes + scale })
  }
  return demands
}

function demandOf(parameter: Parameter, groups: Groups, held: boolean): Demand {
  const { gradient_bytes, update_bytes } = bytesOf(parameter)
  const plan = planStep(parameter, groupOf(parameter, groups), { step: 1, replay: false })
  const state_bytes = stateBytes(parameter)
  return { plan, gradient_bytes, update_bytes, state_bytes, held_bytes: held ? state_bytes : 0 }
}

/** What travels in blocks has memory of its own as float32 while it is computed, beside that of the update. */
function bytesOf({ elements, gradient_dtype, update_dtype, gradient_bytes, update_bytes }: Parameter) {
  const float32 = tensorBytes('float32', elements)
  const floats = [gradient_dtype, update_dtype].filter(isBlockDtype).length * float32
  return {
    gradient_bytes: isBlockDtype(gradient_dtype) ? float32 : gradient_bytes,
    update_bytes: update_bytes + floats,
  }
}
