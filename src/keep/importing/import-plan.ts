import { ServiceError } from '../../errors.js'
import { groupOf, show } from '../../optimizer/hyperparameters.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { StateTensor } from '../../optimizer/state.js'
import type { Run } from '../../run/run.js'
import { stateName } from '../../store/checkpoint/state-source.js'
import { type Conversion, GIVEN_DTYPES } from '../../store/elements.js'
import { type Header, SAFETENSORS_NAMES, type TensorRange } from '../../store/safetensors.js'

export type MomentumForm = 'ema' | 'heavy_ball'

/**
 * `partial`: a parameter that nothing is given of keeps what it has. `momentum_form` undefined: what the header says,
 * if it does.
 */
export type ImportOptions = { partial: boolean; momentum_form?: MomentumForm }

/** Where a given tensor goes: a parameter's count, or one of its state tensors, by its position among them. */
export type Target = { parameter: Parameter } & (
  | { count: CountDtype }
  | { position: number; kept: StateTensor; conversion: Conversion }
)

/**
 * What is to be done with a file's tensors, by their names, and the indices of the parameters that they bring state
 * tensors of.
 */
export type ImportPlan = { targets: ReadonlyMap<string, Target>; given: ReadonlySet<number> }

type CountDtype = (typeof COUNT_DTYPES)[number]

const COUNT_DTYPES = ['I64', 'F32'] as const
const NAMES_IN_MESSAGE = 10

/**
 * Holds the header of a file against a run. Throws STATE_INVALID for a name that the run has nothing of and for one
 * that is lacking, SHAPE_MISMATCH and DTYPE_UNSUPPORTED.
 */
export function planImport(run: Run, header: Header, options: ImportOptions): ImportPlan {
  const form = options.momentum_form ? () => options.momentum_form : formsIn(header)
  const known = new Map(run.parameters.flatMap((parameter) => namesOf(parameter)))
  const targets = new Map<string, Target>()
  for (const range of header.ranges) {
    const found = known.get(range.name)
    if (found === undefined)
      throw invalid(`the body has tensor '${range.name}', run '${run.name}' has none of that name`)
    targets.set(range.name, targetOf(run, range, { ...found, form: form(found.parameter) }))
  }
  return { targets, given: checkWhole(run, targets, options) }
}

function targetOf(
  run: Run,
  { name, dtype, shape }: TensorRange,
  { parameter, position, form }: { parameter: Parameter; position: number; form: MomentumForm | undefined },
): Target {
  if (position < 0) {
    checkShape(name, shape, [])
    return { parameter, count: one(COUNT_DTYPES, dtype, name) }
  }
  const kept = parameter.state[position]
  checkShape(name, shape, kept.shape)
  const plain = { from: one(GIVEN_DTYPES, dtype, name), to: SAFETENSORS_NAMES[kept.dtype] }
  return { parameter, position, kept, conversion: { ...plain, ...factorOf(run, { parameter, kept, form }) } }
}

/** Position -1 is the count. */
function namesOf(parameter: Parameter): [string, { parameter: Parameter; position: number }][] {
  return ['step', ...parameter.state.map(({ name }) => name)].map((tensor, i) => {
    return [stateName(parameter.name, tensor), { parameter, position: i - 1 }]
  })
}

function one<T extends string>(known: readonly T[], dtype: string, name: string): T {
  const found = known.find((other) => other === dtype)
  if (found !== undefined) return found
  throw new ServiceError('DTYPE_UNSUPPORTED', `tensor '${name}' is ${dtype}, expected one of ${known.join(', ')}`)
}

function checkShape(name: string, shape: readonly number[], expected: readonly number[]): void {
  if (String(shape) === String(expected)) return
  throw new ServiceError('SHAPE_MISMATCH', `tensor '${name}' has shape [${shape}], expected [${expected}]`)
}

/** The two forms of Muon's buffer differ by the factor 1 - μ, with the μ that is in force; nothing else has a form. */
function factorOf(
  run: Run,
  { parameter, kept, form }: { parameter: Parameter; kept: StateTensor; form: MomentumForm | undefined },
): Pick<Conversion, 'multiply' | 'divide'> {
  const { hyperparameters } = groupOf(parameter, run.groups)
  if (kept.name !== 'momentum_buffer' || !('momentum_form' in hyperparameters)) return {}
  const { momentum, momentum_form } = hyperparameters
  if (form === undefined || form === momentum_form) return {}
  return momentum_form === 'ema' ? { multiply: 1 - momentum } : { divide: 1 - momentum }
}

/** What the header says of the momentum buffers: one word for all of them, or a map from parameters to words. */
function formsIn({ metadata: { momentum_form } }: Header): (parameter: Parameter) => MomentumForm | undefined {
  if (momentum_form === undefined) return () => undefined
  if (isForm(momentum_form)) return () => momentum_form
  const forms = parseForms(momentum_form)
  return ({ name }) => forms.get(name)
}

function parseForms(text: string): Map<string, MomentumForm> {
  const refuse = () => invalid(`the body's momentum_form is ${show(text)}, expected ema, heavy_ball or a map to these`)
  let given: unknown
  try {
    given = JSON.parse(text)
  } catch {
    throw refuse()
  }
  if (typeof given !== 'object' || given === null) throw refuse()
  const entries = Object.entries(given).map(([name, form]): [string, MomentumForm] => {
    if (isForm(form)) return [name, form]
    throw refuse()
  })
  return new Map(entries)
}

function isForm(value: unknown): value is MomentumForm {
  return value === 'ema' || value === 'heavy_ball'
}

/** Of a parameter there is everything, or its count alone, which then has to be 0, or, with `partial`, nothing. */
function checkWhole(run: Run, targets: ReadonlyMap<string, Target>, { partial }: ImportOptions): Set<number> {
  const given = new Set<number>()
  const absent: string[] = []
  for (const parameter of run.parameters) {
    const names = parameter.state.map(({ name }) => stateName(parameter.name, name))
    const count = stateName(parameter.name, 'step')
    const there = names.filter((name) => targets.has(name))
    if (there.length === 0 && !targets.has(count)) absent.push(parameter.name)
    if (there.length === 0) continue
    const lacking = [count, ...names].find((name) => !targets.has(name))
    if (lacking !== undefined) throw invalid(`the body has tensor '${there[0]}' but no tensor '${lacking}'`)
    given.add(parameter.index)
  }
  if (absent.length === 0 || partial) return given
  const names = absent.slice(0, NAMES_IN_MESSAGE).map((name) => `'${name}'`)
  const more = absent.length > names.length ? ` and ${absent.length - names.length} more` : ''
  throw invalid(
    `the body has no state of ${names.join(', ')}${more} of run '${run.name}'; with partial they keep theirs`,
  )
}

export function invalid(message: string): ServiceError {
  return new ServiceError('STATE_INVALID', message)
}
