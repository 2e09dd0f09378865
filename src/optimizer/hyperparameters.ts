import { inspect } from 'node:util'
import {
  type CoefficientsName,
  checkCoefficients,
  expandCoefficients,
  NAMED_COEFFICIENTS,
  type Triple,
} from '../../kernels/coefficients.js'
import { ServiceError } from '../errors.js'

/** One hyperparameter. `sticky`: a `step` frame may change it from that step on. `not_yet`: values we know and refuse, with the reason. */
export type Rule<T> = Kind<T> & {
  readonly default: T
  readonly description: string
  readonly sticky: boolean
  readonly not_yet?: Readonly<Record<string, string>>
}
type Kind<T> = { readonly expected: string; readonly accepts: (value: unknown) => value is T }
type Table = Readonly<Record<string, Rule<unknown>>>
type Values<T extends Table> = { readonly [K in keyof T]: T[K]['default'] }

export type AdjustLrFn = 'original' | 'match_rms_adamw' | 'spectral' | 'none' | `rms:${number}`
export type Coefficients = Triple | readonly Triple[] | CoefficientsName

const MAX_NS_STEPS = 99
const CUSTOM_RMS = /^rms:(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i

/** A graph input is a float32, so a number that is not finite as one is Inf to the kernel. */
const isNumber = (value: unknown): value is number => typeof value === 'number' && Number.isFinite(Math.fround(value))
const isFraction = (value: unknown): value is number => isNumber(value) && value >= 0 && value < 1

const FINITE: Kind<number> = { expected: 'a finite float32 number', accepts: isNumber }
const NOT_NEGATIVE: Kind<number> = {
  expected: 'a finite float32 number >= 0',
  accepts: (value): value is number => isNumber(value) && value >= 0,
}
const FRACTION: Kind<number> = { expected: 'a number in [0, 1)', accepts: isFraction }
const FRACTIONS: Kind<readonly [number, number]> = {
  expected: 'two numbers in [0, 1)',
  accepts: (value): value is [number, number] => Array.isArray(value) && value.length === 2 && value.every(isFraction),
}
const BOOLEAN: Kind<boolean> = { expected: 'true or false', accepts: (value) => typeof value === 'boolean' }
const ITERATIONS: Kind<number> = {
  expected: `an integer from 1 to ${MAX_NS_STEPS}`,
  accepts: (value): value is number =>
    Number.isInteger(value) && isNumber(value) && value >= 1 && value <= MAX_NS_STEPS,
}
const COEFFICIENTS: Kind<Coefficients> = {
  expected: `three finite numbers, a list of 1 to ${MAX_NS_STEPS} such triples, or one of ${Object.keys(NAMED_COEFFICIENTS).join(', ')}`,
  accepts: (value): value is Coefficients => isTriple(value) || isTriples(value) || isNamedSet(value),
}
const ADJUSTMENT: Kind<AdjustLrFn> = {
  expected: "'original', 'match_rms_adamw', 'spectral', 'none' or 'rms:K' with a finite K > 0",
  accepts: (value): value is AdjustLrFn =>
    value === 'original' ||
    value === 'match_rms_adamw' ||
    value === 'spectral' ||
    value === 'none' ||
    isCustomRms(value),
}

function choice<T extends string>(...values: readonly T[]): Kind<T> {
  const expected = values.map((value) => `'${value}'`).join(' or ')
  return { expected, accepts: (value): value is T => values.some((known) => known === value) }
}

function rule<T>(kind: Kind<T>, fallback: NoInfer<T>, description: string): Rule<T> {
  return { ...kind, default: fallback, description, sticky: true }
}

/** A hyperparameter that says what the state means: fixed once the run exists. */
function fixed<T>(sticky: Rule<T>, not_yet?: Readonly<Record<string, string>>): Rule<T> {
  return { ...sticky, sticky: false, not_yet }
}

const WEIGHT_DECAY = 'Decoupled weight decay λ: the weights shrink by lr·λ in every step, with the unadjusted lr.'

/** Names and defaults of torch.optim.Muon, torch.optim.AdamW and torch.optim.SGD where torch has them. */
export const HYPERPARAMETERS = {
  muon: {
    lr: rule(NOT_NEGATIVE, 1e-3, 'Learning rate η before adjust_lr_fn.'),
    weight_decay: rule(NOT_NEGATIVE, 0.1, WEIGHT_DECAY),
    momentum: rule(FRACTION, 0.95, 'Share μ of the momentum buffer that a step keeps.'),
    nesterov: rule(BOOLEAN, true, 'Looks one step ahead: the direction mixes the new buffer with the gradient.'),
    ns_steps: rule(ITERATIONS, 5, 'Newton-Schulz iterations; unset, what ns_coefficients asks for.'),
    ns_coefficients: rule<Coefficients>(
      COEFFICIENTS,
      [3.4445, -4.775, 2.0315],
      'Coefficients a, b, c of X <- aX + (bA + cA²)X, one triple per iteration; the last one repeats.',
    ),
    eps: rule(
      NOT_NEGATIVE,
      1e-7,
      "Torch's guard of the norm; it applies after an exact rescale to order one, so it never shows.",
    ),
    adjust_lr_fn: rule<AdjustLrFn>(ADJUSTMENT, 'original', 'Factor on lr that depends on the shape of the matrix.'),
    momentum_form: fixed(
      rule(choice('ema', 'heavy_ball'), 'ema', 'Meaning of the buffer: μB + (1-μ)G (ema) or μB + G (heavy_ball).'),
    ),
    momentum_dtype: fixed(rule(choice('float32'), 'float32', 'Type in which the momentum buffer is kept.'), {
      bfloat16: 'the momentum buffer is kept in float32 only',
    }),
  },
  adamw: {
    lr: rule(NOT_NEGATIVE, 1e-3, 'Learning rate η.'),
    betas: rule<readonly [number, number]>(
      FRACTIONS,
      [0.9, 0.999],
      'Shares β1, β2 of the two averages that a step keeps.',
    ),
    eps: rule(NOT_NEGATIVE, 1e-8, 'Added to the root of the second average.'),
    weight_decay: rule(NOT_NEGATIVE, 1e-2, WEIGHT_DECAY),
  },
  sgd: {
    lr: rule(NOT_NEGATIVE, 1e-3, 'Learning rate η.'),
    momentum: rule(FRACTION, 0, 'Share μ of the momentum buffer that a step keeps; 0 is plain gradient descent.'),
    dampening: rule(FINITE, 0, 'Takes dampening·G out of what enters the buffer, but not at the first step.'),
    nesterov: rule(BOOLEAN, false, 'Looks one step ahead; needs momentum > 0 and dampening 0.'),
    weight_decay: rule(NOT_NEGATIVE, 0, WEIGHT_DECAY),
  },
} satisfies Record<string, Table>

export type Algorithm = keyof typeof HYPERPARAMETERS
export type Hyperparameters<A extends Algorithm> = Values<(typeof HYPERPARAMETERS)[A]>
type GroupOf<A extends Algorithm> = {
  readonly name: string
  readonly algorithm: A
  readonly hyperparameters: Hyperparameters<A>
  /** What the client set, of which `hyperparameters` is the completion: an unset ns_steps follows ns_coefficients. */
  readonly given: Readonly<Record<string, unknown>>
}
export type Group = GroupOf<'muon'> | GroupOf<'adamw'> | GroupOf<'sgd'>

/** A group as `open` declares it: hyperparameters stand inline beside the two keys. */
export type RawGroup = { readonly name: string; readonly algorithm: string; readonly [hyperparameter: string]: unknown }

/** Known names that this version cannot do; refusing them with the reason beats calling them unknown. */
const UNSUPPORTED_ALGORITHMS: Readonly<Record<string, string>> = {
  muonclip: 'it needs attentions (QK-clip)',
  adam: 'its weight decay needs the weights, which the service does not hold; use adamw',
}
const UNSUPPORTED: Readonly<Record<Algorithm, Readonly<Record<string, string>>>> = {
  muon: { second_momentum: 'it needs a second state tensor', beta2: 'it belongs to second_momentum' },
  adamw: {},
  sgd: {},
}

const MAX_NAME_LENGTH = 1024

/**
 * Checks a declared group and completes it with the defaults.
 * Throws PARAMETER_INVALID for its name and HYPERPARAMETER_INVALID, with group, key, value and what was expected.
 */
export function parseGroup({ name, algorithm, ...given }: RawGroup): Group {
  checkName('group', name)
  if (isAlgorithm(algorithm)) return checkSet(complete(name, algorithm, given))
  const reason = own(UNSUPPORTED_ALGORITHMS, algorithm)
  if (reason !== undefined) throw refusal(name, `algorithm ${show(algorithm)} is not supported yet: ${reason}`)
  throw refusal(name, `algorithm is ${show(algorithm)}, expected one of ${Object.keys(HYPERPARAMETERS).join(', ')}`)
}

/** The group with some hyperparameters changed, as a `step` frame asks for; the one given stays as it was. Throws HYPERPARAMETER_INVALID. */
export function updateGroup(group: Group, changes: Readonly<Record<string, unknown>>): Group {
  const table: Table = HYPERPARAMETERS[group.algorithm]
  for (const key of Object.keys(changes)) {
    if (key === 'algorithm' || own(table, key)?.sticky === false) {
      throw refusal(group.name, `${key} is fixed at open, a step cannot change it to ${show(changes[key])}`)
    }
  }
  const next = complete(group.name, group.algorithm, { ...group.given, ...changes })
  return 'ns_coefficients' in changes || 'ns_steps' in changes ? checkSet(next) : next
}

/** Every hyperparameter in force, the algorithm first: what `opened` and `receipt` say of a group. */
export function effective(group: Group): { readonly algorithm: Algorithm; readonly [hyperparameter: string]: unknown } {
  return { algorithm: group.algorithm, ...group.hyperparameters }
}

/** The first difference between two groups that makes the state of one useless to the other; undefined where there is none. */
export function stateBearing(existing: Group, given: Group): string | undefined {
  const [before, after] = [effective(existing), effective(given)]
  const table: Table = HYPERPARAMETERS[existing.algorithm]
  const keys = ['algorithm', ...Object.keys(table).filter((key) => !table[key].sticky)]
  const key = keys.find((name) => before[name] !== after[name])
  return key && `${key} is ${show(before[key])} in the run, ${show(after[key])} given`
}

/** The triples of the Newton-Schulz iterations, one each. */
export function iterations({ ns_coefficients, ns_steps }: Hyperparameters<'muon'>): Triple[] {
  if (typeof ns_coefficients === 'string') {
    return expandCoefficients(NAMED_COEFFICIENTS[ns_coefficients].coefficients, ns_steps)
  }
  return expandCoefficients(isTriple(ns_coefficients) ? [ns_coefficients] : ns_coefficients, ns_steps)
}

/** Refuses an empty or an overlong name: names are repeated in messages, receipts and files. */
export function checkName(what: string, name: string): void {
  if (name.length > 0 && name.length <= MAX_NAME_LENGTH) return
  const message = `the name of ${what} ${show(name)} has ${name.length} characters, expected 1 to ${MAX_NAME_LENGTH}`
  throw new ServiceError('PARAMETER_INVALID', message)
}

/** A value from a client as one short line of a message, however large or deep it is. */
export function show(value: unknown): string {
  const text = inspect(value, {
    compact: true,
    depth: 1,
    maxArrayLength: 8,
    maxStringLength: 80,
    breakLength: Number.POSITIVE_INFINITY,
  })
  return text.length > 120 ? `${text.slice(0, 120)}...` : text
}

function isAlgorithm(name: string): name is Algorithm {
  return Object.hasOwn(HYPERPARAMETERS, name)
}

/** A client's key may be `constructor`: only what the table itself holds counts. */
function own<T>(table: Readonly<Record<string, T>>, key: string): T | undefined {
  return Object.hasOwn(table, key) ? table[key] : undefined
}

function complete(name: string, algorithm: Algorithm, given: Readonly<Record<string, unknown>>): Group {
  checkKeys(name, algorithm, Object.keys(given))
  switch (algorithm) {
    case 'muon':
      return { name, algorithm, given, hyperparameters: muon(name, given) }
    case 'adamw':
      return { name, algorithm, given, hyperparameters: read(name, HYPERPARAMETERS.adamw, given) }
    case 'sgd':
      return { name, algorithm, given, hyperparameters: sgd(name, given) }
  }
}

function checkKeys(name: string, algorithm: Algorithm, keys: readonly string[]): void {
  const known = Object.keys(HYPERPARAMETERS[algorithm])
  const key = keys.find((candidate) => !known.includes(candidate))
  if (key === undefined) return
  const reason = own(UNSUPPORTED[algorithm], key)
  if (reason !== undefined) throw refusal(name, `${key} is not supported yet: ${reason}`)
  throw refusal(name, `${show(key)} is no hyperparameter of ${algorithm}, expected one of ${known.join(', ')}`)
}

function read<T extends Table>(name: string, table: T, given: Readonly<Record<string, unknown>>): Values<T> {
  const values = Object.entries(table).map(([key, rule]) => {
    if (!Object.hasOwn(given, key)) return [key, rule.default]
    if (rule.accepts(given[key])) return [key, given[key]]
    throw refusal(name, `${key} is ${show(given[key])}, ${whyNot(rule, given[key])}`)
  })
  return Object.fromEntries(values)
}

function whyNot({ expected, not_yet }: Rule<unknown>, value: unknown): string {
  const reason = not_yet && typeof value === 'string' ? own(not_yet, value) : undefined
  return reason === undefined ? `expected ${expected}` : `which is not supported yet: ${reason}`
}

function muon(name: string, given: Readonly<Record<string, unknown>>): Hyperparameters<'muon'> {
  const values = read(name, HYPERPARAMETERS.muon, given)
  return 'ns_steps' in given ? values : { ...values, ns_steps: defaultSteps(values.ns_coefficients) }
}

function defaultSteps(coefficients: Coefficients): number {
  if (typeof coefficients === 'string') return NAMED_COEFFICIENTS[coefficients].ns_steps
  return isTriple(coefficients) ? HYPERPARAMETERS.muon.ns_steps.default : coefficients.length
}

function sgd(name: string, given: Readonly<Record<string, unknown>>): Hyperparameters<'sgd'> {
  const values = read(name, HYPERPARAMETERS.sgd, given)
  if (!values.nesterov || (values.momentum > 0 && values.dampening === 0)) return values
  const { momentum, dampening } = values
  throw refusal(
    name,
    `nesterov is true, momentum is ${momentum} and dampening is ${dampening}, expected momentum > 0 and dampening 0`,
  )
}

/** Scanning the composed polynomial takes a while, so only a new set or count is checked, not every change of lr. */
function checkSet(group: Group): Group {
  if (group.algorithm !== 'muon') return group
  const { ns_coefficients, ns_steps } = group.hyperparameters
  const reason = checkCoefficients(iterations(group.hyperparameters))
  if (reason === undefined) return group
  throw refusal(
    group.name,
    `ns_coefficients is ${show(ns_coefficients)} with ns_steps ${ns_steps}, which is unsafe: ${reason}`,
  )
}

function refusal(name: string, message: string): ServiceError {
  return new ServiceError('HYPERPARAMETER_INVALID', `group ${show(name)}: ${message}`)
}

function isTriple(value: unknown): value is Triple {
  return Array.isArray(value) && value.length === 3 && value.every(isNumber)
}

function isTriples(value: unknown): value is readonly Triple[] {
  return Array.isArray(value) && value.length >= 1 && value.length <= MAX_NS_STEPS && value.every(isTriple)
}

function isNamedSet(value: unknown): value is CoefficientsName {
  return typeof value === 'string' && Object.hasOwn(NAMED_COEFFICIENTS, value)
}

function isCustomRms(value: unknown): value is `rms:${number}` {
  if (typeof value !== 'string' || !CUSTOM_RMS.test(value)) return false
  const factor = Number(value.slice('rms:'.length))
  return isNumber(factor) && factor > 0
}
