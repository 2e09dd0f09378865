import { ConfigError } from '../config.js'
import type { Region } from '../device/region.js'
import { errorText, ServiceError } from '../errors.js'
import type { StoredGradients } from '../keep/stored-gradients.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { Update } from '../run/place.js'
import { appliedOf } from '../run/record.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import type { StoredGradient, StoredStep } from '../store/journal/journal-reader.js'
import type { Course } from './course.js'
import { dot, numbersOf } from './similarity.js'

/**
 * What a gradient came to: its L2 norm after gradient_scale, and sums of squares of the elements of scale · data, the
 * run's and the alternative's, and of their products.
 */
export type Measure = {
  readonly index: number
  readonly gradient_norm: number
  readonly square: number
  /** Zeros for a parameter that the alternative does not have. */
  readonly other: { readonly square: number; readonly product: number }
}

/** An alternative on its way: `indices` are those of the run's parameters that it has, in its order. */
export type Other = { readonly course: Course; readonly indices: readonly number[] }

/** Computes the gradients of a step for the run, and for an alternative beside it, and compares the updates. */
export class Measurer {
  readonly #gradients: StoredGradients
  readonly #own: Course
  readonly #other: Course | undefined
  /** The alternative's index of each parameter of the run that it has. */
  readonly #indices: ReadonlyMap<number, number>

  constructor(gradients: StoredGradients, own: Course, other: Other | undefined) {
    this.#gradients = gradients
    this.#own = own
    this.#other = other?.course
    this.#indices = new Map(other?.indices.map((index, i) => [index, i]))
  }

  /**
   * In the order of the parameters. Throws UnreadableError where a gradient is none of its step, and ConfigError where
   * the alternative cannot take it.
   */
  async measure(stored: StoredStep): Promise<Measure[]> {
    this.#check(stored)
    const measuring = stored.gradients.map((gradient) => this.#measure(gradient))
    // Nothing is computed any more when the first failure is told.
    await Promise.allSettled(measuring)
    return (await Promise.all(measuring)).sort((one, other) => one.index - other.index)
  }

  #check({ step, gradients, label, end }: StoredStep): void {
    const parameters = this.#own.parameters
    const wrong = gradients.find((stored) => stored.step !== step || stored.parameter >= parameters.length)
    if (wrong) {
      const what = `a gradient of parameter ${wrong.parameter} for step ${wrong.step}`
      throw new UnreadableError(`${wrong.label}: ${what} is none of step ${step}`)
    }
    const said = new Set([...gradients.map(({ parameter }) => parameter), ...end.skipped])
    const missing = parameters.find(({ index }) => !said.has(index))
    if (missing) throw new UnreadableError(`${label}: step ${step} neither has nor skips parameter '${missing.name}'`)
  }

  async #measure(stored: StoredGradient): Promise<Measure> {
    const parameter = this.#own.parameters[stored.parameter]
    const gradient = await named(stored.label, this.#gradients.read(stored, parameter))
    try {
      return await this.#compute(stored, parameter, gradient)
    } finally {
      gradient.release()
    }
  }

  async #compute({ applied, label, step }: StoredGradient, parameter: Parameter, gradient: Region): Promise<Measure> {
    const { contributors } = appliedOf(applied)
    const own = named(label, this.#own.compute(parameter.index, gradient, contributors))
    const at = this.#indices.get(parameter.index)
    const other =
      at === undefined
        ? undefined
        : this.#other?.compute(at, gradient, contributors).catch((error) => refused(step, error))
    const done = await Promise.allSettled([own, other])
    try {
      return compare(parameter, ...(await Promise.all([own, other])))
    } finally {
      for (const result of done) if (result.status === 'fulfilled') result.value?.memory.release()
    }
  }
}

function compare(parameter: Parameter, own: Update, other: Update | undefined): Measure {
  const { index, update_dtype, elements } = parameter
  const a = numbersOf(own.memory.view, update_dtype, elements)
  const measure = { index, gradient_norm: own.gradient_norm, square: own.scale ** 2 * dot(a, a) }
  if (!other) return { ...measure, other: { square: 0, product: 0 } }
  const b = numbersOf(other.memory.view, update_dtype, elements)
  return { ...measure, other: { square: other.scale ** 2 * dot(b, b), product: own.scale * other.scale * dot(a, b) } }
}

/** What goes wrong with a record is told with its name, but for a lack of memory, which is nothing of its own. */
async function named<T>(label: string, work: Promise<T>): Promise<T> {
  return work.catch((error) => {
    /* c8 ignore next -- needs a device that runs out of memory in the middle of this */
    if (error instanceof ServiceError && error.code === 'OVER_CAPACITY') throw error
    throw new UnreadableError(`${label}: ${errorText(error)}`)
  })
}

function refused(step: number, error: unknown): never {
  throw new ConfigError(`the other groups end at step ${step}: ${errorText(error)}`)
}
