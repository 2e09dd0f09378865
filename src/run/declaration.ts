import { ServiceError } from '../errors.js'
import { type Attention, parseAttentions } from '../optimizer/attention.js'
import type { Groups } from '../optimizer/hyperparameters.js'
import { type Parameter, parsingParameters } from '../optimizer/parameter.js'
import { type Presets, parsePresetGroup } from '../optimizer/preset.js'
import type { OpenFrame } from '../wire/frame.js'

/** What an `open` declares of a new run, checked. */
export type Declaration = {
  readonly groups: Groups
  readonly parameters: Parameter[]
  readonly attentions: readonly Attention[]
}

/** Throws for what no `open` may ask of this service; `keeps` says whether it has checkpoints. */
export function refuseUnsupported({ protocol, checkpoint, from, mode }: OpenFrame, keeps: boolean): void {
  if (protocol !== 1)
    throw new ServiceError('PROTOCOL_UNSUPPORTED', `protocol ${protocol} is not spoken here, expected 1`)
  const wanted = from?.checkpoint ?? checkpoint
  if (wanted === undefined) return
  const what = from ? `from: checkpoint '${wanted}' of run '${from.run}'` : `checkpoint '${wanted}'`
  const [fits, asked] = from ? ['create', mode ?? 'create'] : ['resume', mode ?? 'create_or_resume']
  const refuse = (why: string) => new ServiceError('PARAMETER_INVALID', what + why)
  if (!keeps) throw refuse(': this service keeps none, it has no data folder')
  if (asked !== fits) throw refuse(` goes with mode ${fits}, mode is ${asked}`)
  if (from && checkpoint !== undefined)
    throw refuse(` and checkpoint '${checkpoint}' of the run itself exclude each other`)
}

/**
 * Checks what an `open` declares of a run that does not exist yet. Throws PARAMETER_INVALID, HYPERPARAMETER_INVALID…
 * Yields from time to time.
 */
export function* declarationOf(frame: OpenFrame, presets: Presets): Generator<undefined, Declaration> {
  if (!frame.groups || !frame.parameters) {
    throw new ServiceError('PARAMETER_INVALID', `run '${frame.run}' is new: open needs groups and parameters`)
  }
  const groups = parseGroups(frame.groups, presets)
  const parameters = yield* parsingParameters(frame.parameters, groups)
  return { groups, parameters, attentions: parseAttentions(frame.attentions ?? [], parameters) }
}

/** The groups of an `open` by name. */
export function parseGroups(raw: NonNullable<OpenFrame['groups']>, presets: Presets): Groups {
  const groups = new Map<string, ReturnType<typeof parsePresetGroup>>()
  for (const given of raw) {
    if (groups.has(given.name)) throw new ServiceError('PARAMETER_INVALID', `there are two groups '${given.name}'`)
    groups.set(given.name, parsePresetGroup(given, presets))
  }
  return groups
}
