import { isWireDtype, kernelDtype, tensorBytes, WIRE_DTYPES, type WireDtype } from '../../kernels/dtype.js'
import { type ErrorCode, ServiceError } from '../errors.js'
import { atOnce } from '../wire/at-once.js'
import type { Layout, ParameterDeclaration } from '../wire/frame.js'
import { planStep } from './algorithms/algorithm.js'
import { checkName, type Group, show } from './hyperparameters.js'
import type { Block, LaidParameter } from './layout.js'
import { type StateTensor, stateTensors } from './state.js'

/** A parameter of a run, checked against its group; `state` are the tensors that the service keeps for it. */
export type Parameter = LaidParameter & {
  readonly index: number
  readonly name: string
  readonly state: readonly StateTensor[]
}

/** A gradient, an update and two state tensors of 4 bytes per element stay below 2^53 bytes together. */
const MAX_ELEMENTS = 2 ** 49

/** torch has no tensor with more. */
export const MAX_DIMENSIONS = 64

/** Blocks of all parameters of one `open`: `heads` makes a billion of them out of twenty bytes. */
export const MAX_BLOCKS = 2 ** 18

/**
 * Checks the parameters of an `open` against their groups and lays them out.
 * Throws PARAMETER_INVALID or DTYPE_UNSUPPORTED with the parameter's name, index and both values.
 */
export function parseParameters(raw: readonly ParameterDeclaration[], groups: ReadonlyMap<string, Group>): Parameter[] {
  return atOnce(parsingParameters(raw, groups))
}

/** Does what `parseParameters` does, and yields from time to time: a model may have 100,000 parameters. */
export function* parsingParameters(
  raw: readonly ParameterDeclaration[],
  groups: ReadonlyMap<string, Group>,
): Generator<undefined, Parameter[]> {
  if (raw.length === 0) throw new ServiceError('PARAMETER_INVALID', 'there are no parameters, expected at least one')
  const seen = new Map<string, number>()
  // Parameters that are declared alike but for their names are laid out alike. A model has few such kinds.
  const alike = new Map<string, Known[]>()
  const parameters: Parameter[] = []
  let blocks = 0
  for (const [index, given] of raw.entries()) {
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    const fail = refusal(given, index)
    checkName(`parameter ${index}`, given.name)
    const twin = seen.get(given.name)
    if (twin !== undefined) throw fail(`has the name of parameter ${twin}`)
    seen.set(given.name, index)
    const group = groups.get(given.group)
    if (group === undefined) throw fail(`is in group ${show(given.group)}, expected one of ${show([...groups.keys()])}`)
    const left = MAX_BLOCKS - blocks
    const form = knownForm(alike, given) ?? learn(alike, given, formOf(given, { group, blocks: left, fail }))
    checkBlocks(form.blocks.length, left, fail)
    blocks += form.blocks.length
    parameters.push({ index, name: given.name, ...form })
  }
  return parameters
}

/** A parameter as `opened` lists it, without its `step` and `algorithm`, which the run knows. */
export function describe(parameter: Parameter) {
  const { index, name, shape, group, gradient_dtype, update_dtype } = parameter
  return { index, name, shape, group, gradient_dtype, update_dtype, ...layoutOf(parameter) }
}

/** Bytes of state that the service keeps for a parameter from one step to the next. */
export function stateBytes(parameter: Parameter): number {
  return parameter.state.reduce((sum, { bytes }) => sum + bytes, 0)
}

/** Bytes of state that all of them have from their first step on. */
export function allStateBytes(parameters: readonly Parameter[]): number {
  return parameters.reduce((sum, parameter) => sum + stateBytes(parameter), 0)
}

/**
 * The first difference between a run's parameters and a resuming client's; undefined where they are the same. Yields
 * from time to time.
 */
export function* findingDifference(
  existing: readonly Parameter[],
  given: readonly Parameter[],
): Generator<undefined, string | undefined> {
  for (const [index, parameter] of existing.slice(0, given.length).entries()) {
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    const found = difference(parameter, given[index])
    if (found !== undefined) return found
  }
  if (existing.length === given.length) return undefined
  return `it has ${existing.length} parameters, ${given.length} given`
}

type Fail = (message: string, code?: ErrorCode) => ServiceError
/** `blocks`: how many blocks the parameter may have, of the MAX_BLOCKS that all parameters share. */
type Context = { group: Group; blocks: number; fail: Fail }
/** A parameter without its name and place. */
type Form = Omit<Parameter, 'index' | 'name'>

/** How parameters that are declared like this one are laid out. */
type Known = { given: ParameterDeclaration; form: Form }

function knownForm(alike: ReadonlyMap<string, readonly Known[]>, given: ParameterDeclaration): Form | undefined {
  const { gradient_dtype, update_dtype, matrices } = given
  const known = alike.get(keyOf(given))?.find(({ given: other }) => {
    const isTyped = other.gradient_dtype === gradient_dtype && other.update_dtype === update_dtype
    return isTyped && other.matrices === matrices
  })
  return known?.form
}

function learn(alike: Map<string, Known[]>, given: ParameterDeclaration, form: Form): Form {
  const key = keyOf(given)
  alike.set(key, [...(alike.get(key) ?? []), { given, form }])
  return form
}

/** The numbers of a declaration and, last, its group: what is left of it has a few values only. */
function keyOf({ shape, split, heads, group }: ParameterDeclaration): string {
  return `${shape} ${split} ${heads} ${group}`
}

/** Work over all parameters yields after so many of them, so that others have the event loop in between. */
export const PARAMETERS_PER_YIELD = 64

function refusal(given: ParameterDeclaration, index: number): Fail {
  return (message, code = 'PARAMETER_INVALID') =>
    new ServiceError(code, `parameter ${show(given.name)} ${message}`, { parameter: index })
}

function formOf(given: ParameterDeclaration, context: Context): Form {
  const { fail } = context
  const { group } = given
  const shape = [...given.shape]
  const elements = count(shape, fail)
  const gradient_dtype = dtype('gradient_dtype', given.gradient_dtype, fail)
  const update_dtype = dtype('update_dtype', given.update_dtype, fail)
  const laid: LaidParameter = {
    ...{ shape, group, gradient_dtype, update_dtype, ...layoutOf(given), elements },
    kernel_dtypes: { gradient_dtype: kernelDtype(gradient_dtype), update_dtype: kernelDtype(update_dtype) },
    gradient_bytes: tensorBytes(gradient_dtype, elements),
    update_bytes: tensorBytes(update_dtype, elements),
    blocks: ['muon', 'muonclip'].includes(context.group.algorithm)
      ? matrices(given, context)
      : noMatrices(given, context),
  }
  // Which state tensors a kernel keeps is the same in every step, so the first one tells.
  const { kernel } = planStep(laid, context.group, { step: 1, replay: false })
  return { ...laid, state: stateTensors(kernel, laid) }
}

function count(shape: readonly number[], fail: Fail): number {
  if (shape.length > MAX_DIMENSIONS) throw fail(`has ${shape.length} dimensions, expected at most ${MAX_DIMENSIONS}`)
  const bad = shape.find((size) => !isPositive(size))
  if (bad !== undefined) throw fail(`has ${bad} in its shape ${show(shape)}, expected integers from 1 on`)
  const elements = product(shape)
  if (elements <= MAX_ELEMENTS) return elements
  throw fail(`has shape ${show(shape)}, which is ${elements} elements, expected at most ${MAX_ELEMENTS}`)
}

function dtype(key: string, value: string | undefined, fail: Fail): WireDtype {
  if (value === undefined) return 'float32'
  if (isWireDtype(value)) return value
  throw fail(`has ${key} ${show(value)}, expected one of ${WIRE_DTYPES.join(', ')}`, 'DTYPE_UNSUPPORTED')
}

/** The layout's keys without those that are undefined: a key that the client left out is left out everywhere. */
function layoutOf({ split, heads, matrices }: Layout): Layout {
  return {
    ...(split === undefined ? {} : { split: [...split] }),
    ...(heads === undefined ? {} : { heads }),
    ...(matrices === undefined ? {} : { matrices }),
  }
}

function noMatrices(given: ParameterDeclaration, { group: { algorithm }, fail }: Context): Block[] {
  const [key] = Object.keys(layoutOf(given))
  if (key === undefined) return []
  throw fail(`has ${key}, but ${algorithm} has no matrices: leave it out`)
}

/** Cuts the tensor into matrices and these into blocks of rows. In C order each is contiguous, one behind the other. */
function matrices(given: ParameterDeclaration, { fail, blocks: left }: Context): Block[] {
  const { batch, rows, cols } = matrixShape(given, fail)
  checkRows(given, rows, fail)
  const { split, heads } = given
  const perMatrix = split?.length ?? heads ?? 1
  const blocks = batch * perMatrix
  checkBlocks(blocks, left, fail)
  let offset = 0
  return Array.from({ length: blocks }, (_, i) => {
    const block = { rows: split ? split[i % perMatrix] : rows / perMatrix, cols, offset }
    offset += block.rows * cols
    return block
  })
}

function checkBlocks(blocks: number, left: number, fail: Fail): void {
  if (blocks <= left) return
  throw fail(`is cut into ${blocks} matrices, ${left} are left of ${MAX_BLOCKS} for all parameters`)
}

function matrixShape(
  { shape, matrices }: ParameterDeclaration,
  fail: Fail,
): { batch: number; rows: number; cols: number } {
  const rank = shape.length
  if (rank < 2) throw fail(`has shape ${show(shape)}, muon needs at least two dimensions: put it in a group with adamw`)
  if (matrices !== undefined && matrices !== 'flatten' && matrices !== 'batch') {
    throw fail(`has matrices ${show(matrices)}, expected 'flatten' or 'batch'`)
  }
  if (rank > 2 && matrices === undefined) {
    throw fail(`has shape ${show(shape)}, muon needs matrices 'flatten' or 'batch' for more than two dimensions`)
  }
  const at = matrices === 'batch' ? rank - 2 : 0
  return { batch: product(shape.slice(0, at)), rows: shape[at], cols: product(shape.slice(at + 1)) }
}

function checkRows({ split, heads }: ParameterDeclaration, rows: number, fail: Fail): void {
  if (split && heads !== undefined) throw fail('has both split and heads, expected one of them')
  if (split) checkSplit(split, rows, fail)
  if (heads === undefined || (isPositive(heads) && rows % heads === 0)) return
  throw fail(`has heads ${heads}, expected a divisor of its ${rows} rows`)
}

function checkSplit(split: readonly number[], rows: number, fail: Fail): void {
  const bad = split.find((height) => !isPositive(height))
  if (bad !== undefined) throw fail(`has ${bad} in its split ${show(split)}, expected integers from 1 on`)
  const sum = split.reduce((total, height) => total + height, 0)
  if (sum !== rows) throw fail(`has split ${show(split)}, which sums to ${sum}, expected its ${rows} rows`)
}

export function isPositive(value: number): boolean {
  return Number.isSafeInteger(value) && value > 0
}

function product(sizes: readonly number[]): number {
  return sizes.reduce((total, size) => total * size, 1)
}

const COMPARED = ['name', 'shape', 'group', 'gradient_dtype', 'update_dtype', 'split', 'heads', 'matrices'] as const

function difference(existing: Parameter, given: Parameter): string | undefined {
  const key = COMPARED.find((name) => !isSame(existing[name], given[name]))
  const where = `parameter ${existing.index} (${show(existing.name)})`
  return key && `${where} has ${key} ${show(existing[key])} in the run, ${show(given[key])} given`
}

/** Whether two texts, numbers or lists of numbers are equal. */
function isSame(one: unknown, other: unknown): boolean {
  return one === other || (Array.isArray(one) && JSON.stringify(one) === JSON.stringify(other))
}
