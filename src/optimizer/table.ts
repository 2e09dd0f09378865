import { NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { type Coefficients, isCoefficients, isNumber, MAX_NS_STEPS } from './coefficients.js'

/** One hyperparameter. `sticky`: a `step` frame may change it, and the change holds from that step on. */
export type Rule<T> = Kind<T> & { readonly default: T; readonly description: string; readonly sticky: boolean }
type Kind<T> = { readonly expected: string; readonly accepts: (value: unknown) => value is T }
export type Table = Readonly<Record<string, Rule<unknown>>>
export type Values<T extends Table> = { readonly [K in keyof T]: T[K]['default'] }

export type AdjustLrFn = 'original' | 'match_rms_adamw' | 'spectral' | 'none' | `rms:${number}`

const CUSTOM_RMS = /^rms:(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?$/i

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
const NO_L2: Kind<number> = {
  expected: '0, because torch adds this decay to the gradient, which needs the weights; adamw decays without them',
  accepts: (value): value is number => value === 0,
}
const BOOLEAN: Kind<boolean> = { expected: 'true or false', accepts: (value) => typeof value === 'boolean' }
const NOT_CENTERED: Kind<boolean> = {
  expected: 'false, because centering is not supported',
  accepts: (value): value is boolean => value === false,
}
const ITERATIONS: Kind<number> = {
  expected: `an integer from 1 to ${MAX_NS_STEPS}`,
  accepts: (value): value is number =>
    Number.isInteger(value) && isNumber(value) && value >= 1 && value <= MAX_NS_STEPS,
}
const COEFFICIENTS: Kind<Coefficients> = {
  expected: `three finite numbers, a list of 1 to ${MAX_NS_STEPS} such triples, or one of ${Object.keys(NAMED_COEFFICIENTS).join(', ')}`,
  accepts: isCoefficients,
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

/** A hyperparameter that no step changes, because it says what the numbers of the state mean. */
function fixed<T>(sticky: Rule<T>): Rule<T> {
  return { ...sticky, sticky: false }
}

const WEIGHT_DECAY = 'Decoupled weight decay λ: the weights shrink by lr·λ in every step, with the unadjusted lr.'

const AMSGRAD = 'Divides by the root of the largest second average so far, kept in max_exp_avg_sq.'

const ADAM = {
  lr: rule(NOT_NEGATIVE, 1e-3, 'Learning rate η.'),
  betas: rule<readonly [number, number]>(
    FRACTIONS,
    [0.9, 0.999],
    'Shares β1, β2 of the two averages that a step keeps.',
  ),
  eps: rule(NOT_NEGATIVE, 1e-8, 'Added to the root of the second average.'),
}

/** The hyperparameters of each algorithm, with the names and defaults of torch.optim where torch has them. */
const TABLES = {
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
    momentum_dtype: fixed(
      rule(
        choice('float32', 'bfloat16'),
        'float32',
        'Type in which the momentum buffer is kept; bfloat16 halves it and rounds it to nearest even in every step.',
      ),
    ),
    second_momentum: fixed(
      rule(
        choice('none', 'normuon'),
        'none',
        'With normuon the lines of the longer side are evened out by a running mean of their squares (arXiv 2510.05491).',
      ),
    ),
    beta2: rule(FRACTION, 0.95, 'Share β2 of the second momentum that a step keeps; read with second_momentum only.'),
  },
  adamw: {
    ...ADAM,
    weight_decay: rule(NOT_NEGATIVE, 1e-2, WEIGHT_DECAY),
    amsgrad: fixed(rule(BOOLEAN, false, AMSGRAD)),
  },
  adam: {
    ...ADAM,
    weight_decay: rule(NO_L2, 0, 'Only 0.'),
    amsgrad: fixed(rule(BOOLEAN, false, AMSGRAD)),
  },
  rmsprop: {
    lr: rule(NOT_NEGATIVE, 1e-2, 'Learning rate η.'),
    alpha: rule(FRACTION, 0.99, 'Share α of the average of squares that a step keeps.'),
    eps: rule(NOT_NEGATIVE, 1e-8, 'Added to the root of the average.'),
    weight_decay: rule(NO_L2, 0, 'Only 0.'),
    momentum: rule(FRACTION, 0, 'Share μ of the momentum buffer that a step keeps.'),
    centered: fixed(rule(NOT_CENTERED, false, 'Only false.')),
  },
  sgd: {
    lr: rule(NOT_NEGATIVE, 1e-3, 'Learning rate η.'),
    momentum: rule(FRACTION, 0, 'Share μ of the momentum buffer that a step keeps; 0 is plain gradient descent.'),
    dampening: rule(FINITE, 0, 'Takes dampening·G out of what enters the buffer, but not at the first step.'),
    nesterov: rule(BOOLEAN, false, 'Looks one step ahead; needs momentum > 0 and dampening 0.'),
    weight_decay: rule(NOT_NEGATIVE, 0, WEIGHT_DECAY),
  },
} satisfies Record<string, Table>

/** The same hyperparameter with another default. */
function withDefault<T>(rule: Rule<T>, fallback: NoInfer<T>): Rule<T> {
  return { ...rule, default: fallback }
}

/**
 * Every algorithm with its hyperparameters. `muonclip` is Muon as in Kimi K2 (arXiv 2507.20534, Algorithm 1); its
 * QK-clip is declared at `open`, as `attentions`.
 */
export const HYPERPARAMETERS = {
  ...TABLES,
  muonclip: {
    ...TABLES.muon,
    adjust_lr_fn: withDefault(TABLES.muon.adjust_lr_fn, 'match_rms_adamw'),
    momentum_form: withDefault(TABLES.muon.momentum_form, 'heavy_ball'),
  },
}

export type Algorithm = keyof typeof HYPERPARAMETERS
export type Hyperparameters<A extends Algorithm> = Values<(typeof HYPERPARAMETERS)[A]>

function isCustomRms(value: unknown): value is `rms:${number}` {
  if (typeof value !== 'string' || !CUSTOM_RMS.test(value)) return false
  const factor = Number(value.slice('rms:'.length))
  return isNumber(factor) && factor > 0
}
