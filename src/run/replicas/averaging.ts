import assert from 'node:assert'
import type { Device } from '../../device/device.js'
import { ServiceError } from '../../errors.js'
import type { Contribution } from '../../wire/frame.js'
import type { Contributor } from '../digest.js'
import { answered } from '../place.js'
import type { Buffers } from '../step/buffers.js'
import type { Gathering } from '../step/gathering.js'
import type { Host } from '../step/host.js'
import { passed, type Whole } from '../step/part.js'
import type { Step } from '../step/step.js'
import type { Updates } from '../step/updates.js'

export type AveragingMeans = {
  host: Host
  device: Device
  buffers: Buffers
  updates: Updates
  /** What the ranks of each replica send. */
  gatherings: readonly Gathering[]
  /** Told when gradients of a replica were looked at; where one was refused its `end`s may lack it. */
  checked: (replica: number) => void
}

/** What a lane has found in a gradient of a replica: a fingerprint as soon as it is known to be finite. */
type Check = { readonly version: number; fingerprint: bigint | undefined }

/**
 * The mean of what several replicas send. Each of their gradients is looked at as soon as it is whole: NaN and Inf are
 * refused to the replica that has sent them. Nothing is computed before it is known which replicas the step is the mean
 * of; then each gradient is the mean in the order of the replicas, whoever came first.
 */
export class Averaging {
  readonly #means: AveragingMeans
  /** By replica and parameter. */
  readonly #checks: readonly Map<number, Check>[]
  /** How many gradients of each replica are being looked at. */
  readonly #looking: number[]
  readonly #computing = new Set<Promise<boolean>>()

  constructor(means: AveragingMeans) {
    this.#means = means
    this.#checks = means.gatherings.map(() => new Map())
    this.#looking = means.gatherings.map(() => 0)
  }

  /** Whether every gradient of a replica that is whole was looked at. */
  isChecked(replica: number): boolean {
    return this.#looking[replica] === 0
  }

  /** A gradient of a replica is whole. */
  whole(replica: number, index: number, step: Step): void {
    const version = this.#means.gatherings[replica].version(index)
    const known = this.#checks[replica].get(index)
    if (known?.version !== version) void this.#check({ replica, index, step, version })
    else if (known.fingerprint !== undefined) this.#checked(replica, index, step)
  }

  /** A member has begun the step in progress: what it has sent of the last one is all that will come of that. */
  begun(): void {
    const { finished } = this.#means.host.steps
    if (!finished) return
    const waiting = new Set(this.#means.gatherings.flatMap((gathering) => gathering.wholes(finished)))
    for (const index of waiting) this.#checkReachable(index, finished)
  }

  /**
   * Computes the gradients of a step that is closed, each the mean of the contributions; answers whether all of them
   * were applied. What was not is refused to those who have sent it. None of it can change once the call returns.
   */
  async compute(step: Step, contributions: readonly Contribution[]): Promise<boolean> {
    const [{ replica }] = contributions
    const indices = this.#means.gatherings[replica].wholes(step).filter((index) => !step.hasApplied(index))
    const done = await Promise.all(indices.map((index) => this.#track(this.#compute(step, index, contributions))))
    return done.every((isApplied) => isApplied)
  }

  /** When nothing is computed. */
  async idle(): Promise<void> {
    /* c8 ignore next -- a member opens the run while a mean is computed again */
    while (this.#computing.size > 0) await Promise.all(this.#computing)
  }

  async #check({ replica, index, step, version }: { replica: number; index: number; step: Step; version: number }) {
    const { device, gatherings, buffers, host, checked } = this.#means
    const gathering = gatherings[replica]
    const isSame = () => gathering.version(index) === version
    const check: Check = { version, fingerprint: undefined }
    const { unit, parameter } = host.shard.place(index)
    const gradient = buffers.gradient(replica, index)
    this.#checks[replica].set(index, check)
    this.#looking[replica] += 1
    try {
      const look = { looksAt: parameter.gradient_dtype, gradient }
      const found = await device.run(() => (isSame() ? look : undefined), { cancelled: false }, unit)
      if (found?.outcome === 'not_finite') throw await gathering.blame(notFinite(parameter, step), index)
      check.fingerprint = found?.gradientFingerprint
    } catch (error) {
      if (isSame()) gathering.refuse(index, error)
    }
    gradient.release()
    this.#looking[replica] -= 1
    if (isSame()) this.#checked(replica, index, step)
    checked(replica)
  }

  #checked(replica: number, index: number, step: Step): void {
    if (!step.hasApplied(index)) return
    const contributors = this.#contributors(index)
    const own = contributors.find((contributor) => contributor.replica === replica)
    if (own?.fingerprint === this.#checks[replica].get(index)?.fingerprint) this.#tryRepeat(index, step, contributors)
    else this.#means.gatherings[replica].refuse(index, this.#otherGradient(replica, index, step))
  }

  /** Computes a gradient again once all that it was the mean of have come again. */
  #tryRepeat(index: number, step: Step, contributors: readonly Contributor[]): void {
    const isThere = ({ replica, fingerprint }: Contributor) => {
      const check = this.#checks[replica]?.get(index)
      return this.#isWhole(replica, index, step) && check?.fingerprint === fingerprint
    }
    if (contributors.every(isThere)) void this.#track(this.#compute(step, index, contributors))
    else this.#checkReachable(index, step)
  }

  /** A mean is computed again of what all its replicas send again: not once one of them is further, or is gone. */
  #checkReachable(index: number, step: Step): void {
    const { gatherings, host } = this.#means
    const { current } = host.steps
    /* c8 ignore next -- after a disk that was full some send again what others have not yet */
    if (step === current) return
    const isGone = ({ replica }: Contributor) => {
      const ranks = gatherings[replica]?.ranks
      if (!ranks) return true
      return !this.#isWhole(replica, index, step) && ranks.all.some((rank) => current.isBegunBy(ranks.idOf(rank)))
    }
    if (!this.#contributors(index).some(isGone)) return
    for (const gathering of gatherings)
      if (gathering.isWhole(index, step)) gathering.refuse(index, passed({ index, step }, current.number))
  }

  #isWhole(replica: number, index: number, step: Step): boolean {
    /* c8 ignore next -- a replica that the run has not any more */
    return this.#means.gatherings[replica]?.isWhole(index, step) ?? false
  }

  /** What the parameter's gradient was the mean of when it was last applied. */
  #contributors(index: number): readonly Contributor[] {
    /* c8 ignore next -- a step that had no replicas, which none is told to have been part of */
    return this.#means.host.shard.place(index).record?.contributors ?? []
  }

  async #compute(step: Step, index: number, contributions: readonly Contribution[]): Promise<boolean> {
    const { buffers, gatherings, host, updates } = this.#means
    const { gradient_dtype: dtype } = host.shard.place(index).parameter
    const total = contributions.reduce((sum, { weight }) => sum + weight, 0)
    const parts = contributions.map(({ replica, weight }) => {
      return { span: buffers.gradient(replica, index), share: Math.fround(weight / total) }
    })
    const gradient = buffers.mean(index)
    const involved = contributions.map(({ replica }) => gatherings[replica])
    try {
      const contributors = contributions.map(({ replica, weight }) => {
        return { replica, weight, fingerprint: this.#fingerprint(replica, index, step) }
      })
      for (const gathering of involved) gathering.hold(index)
      const whole: Whole = {
        ...{ step, index, gradient, mean: { dtype, parts }, contributors },
        target: () => updates.take(index),
        ticket: { cancelled: false },
      }
      const update = await answered((answer) => host.compute(whole, answer))
      /* c8 ignore next -- the device is closed meanwhile */
      if (!update) return false
      updates.keep(index, step.number, update)
      for (const gathering of involved) gathering.answer(index, update)
      return true
    } catch (error) {
      for (const gathering of involved) gathering.refuse(index, error)
      return false
      /* c8 ignore next -- V8 counts the way on which the block before throws */
    } finally {
      for (const { span } of parts) span.release()
      gradient.release()
    }
  }

  #fingerprint(replica: number, index: number, step: Step): bigint {
    const fingerprint = this.#isWhole(replica, index, step) && this.#checks[replica].get(index)?.fingerprint
    assert(
      typeof fingerprint === 'bigint',
      'a replica has ended a step with gradients that are whole and were looked at',
    )
    return fingerprint
  }

  #track(computing: Promise<boolean>): Promise<boolean> {
    const tracked = computing.finally(() => this.#computing.delete(tracked))
    this.#computing.add(tracked)
    return tracked
  }

  #otherGradient(replica: number, index: number, step: Step): ServiceError {
    const { name } = this.#means.host.shard.place(index).parameter
    const message = `parameter '${name}' was applied for step ${step.number} with another gradient of replica ${replica}`
    const fields = { parameter: index, step: step.number, expected_step: step.expected }
    return new ServiceError('STEP_CONFLICT', message, fields)
  }
}

function notFinite({ name, index }: { name: string; index: number }, { number: step }: Step): ServiceError {
  const message = `the gradient of parameter '${name}' for step ${step} holds NaN or Inf`
  return new ServiceError('GRADIENT_NOT_FINITE', message, { parameter: index, step })
}
