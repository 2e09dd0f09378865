import assert from 'node:assert'
import { isBlockDtype, isWireDtype, WIRE_DTYPES, type WireDtype } from '../../../kernels/dtype.js'
import type { Plan } from '../../optimizer/plan.js'
import type { Blocks, Job, JobResult, Look, Mean, Request } from '../job.js'
import type { Allocation, Span } from '../region.js'

/**
 * Jobs on their way to another thread. Objects are cloned property by property, which takes longer than a small job:
 * of all jobs together two arrays are sent, and what many of them share once.
 */
export type PackedJobs = {
  readonly count: number
  readonly plans: readonly Plan[]
  readonly owners: readonly Allocation[]
  /** Addresses and fingerprints. */
  readonly words: BigUint64Array
  readonly numbers: Float64Array
}

/** Results on their way back. */
export type PackedResults = { readonly words: BigUint64Array; readonly numbers: Float64Array }

// In the place of the number of a job's plan.
const NO_PLAN = -1
const OUTCOMES = ['computed', 'other_gradient', 'not_finite'] as const satisfies JobResult['outcome'][]
const RESULT_WORDS = 2
const RESULT_NUMBERS = 4

export function packJobs(jobs: readonly Request[]): PackedJobs {
  const writer = new Writer()
  for (const job of jobs) writer.request(job)
  return { count: jobs.length, ...writer.end() }
}

export function unpackJobs(packed: PackedJobs): Request[] {
  const reader = new Reader(packed)
  return Array.from({ length: packed.count }, () => reader.request())
}

export function packResults(results: readonly JobResult[]): PackedResults {
  const words = new BigUint64Array(RESULT_WORDS * results.length)
  const numbers = new Float64Array(RESULT_NUMBERS * results.length)
  for (const [i, result] of results.entries()) {
    words[RESULT_WORDS * i] = result.gradientFingerprint
    words[RESULT_WORDS * i + 1] = result.updateFingerprint
    numbers[RESULT_NUMBERS * i] = OUTCOMES.indexOf(result.outcome)
    numbers[RESULT_NUMBERS * i + 1] = result.gradientSquare
    numbers[RESULT_NUMBERS * i + 2] = result.updateSquare
    numbers[RESULT_NUMBERS * i + 3] = result.computeSeconds
  }
  return { words, numbers }
}

export function unpackResults({ words, numbers }: PackedResults): JobResult[] {
  return Array.from({ length: words.length / RESULT_WORDS }, (_, i) => ({
    outcome: OUTCOMES[numbers[RESULT_NUMBERS * i]],
    gradientFingerprint: words[RESULT_WORDS * i],
    updateFingerprint: words[RESULT_WORDS * i + 1],
    gradientSquare: numbers[RESULT_NUMBERS * i + 1],
    updateSquare: numbers[RESULT_NUMBERS * i + 2],
    computeSeconds: numbers[RESULT_NUMBERS * i + 3],
  }))
}

/** What many jobs share, each with the number by which a job names it. */
class Shared<T> {
  readonly values: T[] = []
  readonly #numbers = new Map<T, number>()

  numberOf(value: T): number {
    const known = this.#numbers.get(value)
    if (known !== undefined) return known
    const number = this.values.push(value) - 1
    this.#numbers.set(value, number)
    return number
  }
}

class Writer {
  readonly #plans = new Shared<Plan>()
  readonly #owners = new Shared<Allocation>()
  readonly #words: bigint[] = []
  readonly #numbers: number[] = []

  request(request: Request): void {
    if ('plan' in request) return this.#job(request)
    this.#numbers.push(NO_PLAN, WIRE_DTYPES.indexOf(request.looksAt))
    this.#span(request.gradient)
  }

  #job({ plan, gradient, received, source, mean, gradient_scale, state, next, update, sent, expected }: Job): void {
    this.#numbers.push(this.#plans.numberOf(plan), gradient_scale)
    this.#span(gradient)
    if (this.#has(received)) this.#blocks(received)
    if (this.#has(source)) this.#span(source)
    if (this.#has(mean)) this.#mean(mean)
    this.#span(update)
    if (this.#has(sent)) this.#blocks(sent)
    if (this.#has(state)) this.#pointers(state)
    this.#pointers(next)
    if (this.#has(expected)) this.#words.push(expected)
  }

  end(): Omit<PackedJobs, 'count'> {
    const words = BigUint64Array.from(this.#words)
    return { plans: this.#plans.values, owners: this.#owners.values, words, numbers: Float64Array.from(this.#numbers) }
  }

  /** Says whether something comes that may be left out. */
  #has<T>(value: T | undefined): value is T {
    this.#numbers.push(value === undefined ? 0 : 1)
    return value !== undefined
  }

  #span({ space, pointer, bytes, owner, shared }: Span): void {
    this.#words.push(pointer)
    this.#numbers.push(bytes, this.#owners.numberOf(owner), space === 'gpu' ? 1 : 0, shared ? 1 : 0)
  }

  #blocks({ span, dtype }: Blocks): void {
    this.#numbers.push(WIRE_DTYPES.indexOf(dtype))
    this.#span(span)
  }

  #mean({ dtype, parts }: Mean): void {
    this.#numbers.push(WIRE_DTYPES.indexOf(dtype), parts.length)
    for (const { span, share } of parts) {
      this.#numbers.push(share)
      this.#span(span)
    }
  }

  #pointers(pointers: readonly bigint[]): void {
    this.#numbers.push(pointers.length)
    this.#words.push(...pointers)
  }
}

class Reader {
  readonly #packed: PackedJobs
  #word = 0
  #number = 0

  constructor(packed: PackedJobs) {
    this.#packed = packed
  }

  request(): Request {
    const plan = this.#next()
    return plan === NO_PLAN ? this.#look() : this.#job(this.#packed.plans[plan])
  }

  #look(): Look {
    return { looksAt: this.#dtype(), gradient: this.#span() }
  }

  #job(plan: Plan): Job {
    const gradient_scale = this.#next()
    const gradient = this.#span()
    const received = this.#optional(() => this.#blocks())
    const source = this.#optional(() => this.#span())
    const mean = this.#optional(() => this.#mean())
    const update = this.#span()
    const sent = this.#optional(() => this.#blocks())
    const state = this.#optional(() => this.#pointers())
    const next = this.#pointers()
    const expected = this.#optional(() => this.#nextWord())
    return { plan, gradient, received, source, mean, gradient_scale, state, next, update, sent, expected }
  }

  #next(): number {
    return this.#packed.numbers[this.#number++]
  }

  #nextWord(): bigint {
    return this.#packed.words[this.#word++]
  }

  #optional<T>(read: () => T): T | undefined {
    return this.#next() === 0 ? undefined : read()
  }

  #span(): Span {
    const pointer = this.#nextWord()
    const bytes = this.#next()
    const owner = this.#packed.owners[this.#next()]
    const space = this.#next() === 1 ? 'gpu' : 'host'
    return { pointer, bytes, owner, space, shared: this.#next() === 1 }
  }

  #blocks(): Blocks {
    const dtype = this.#dtype()
    assert(isBlockDtype(dtype), 'the writer has written it')
    return { span: this.#span(), dtype }
  }

  #mean(): Mean {
    const dtype = this.#dtype()
    const parts = Array.from({ length: this.#next() }, () => ({ share: this.#next(), span: this.#span() }))
    return { dtype, parts }
  }

  #dtype(): WireDtype {
    const dtype = WIRE_DTYPES[this.#next()]
    assert(isWireDtype(dtype), 'the writer has written one')
    return dtype
  }

  #pointers(): bigint[] {
    return Array.from({ length: this.#next() }, () => this.#nextWord())
  }
}
