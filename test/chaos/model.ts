import { createHash } from 'node:crypto'
import type { OpenOptions, StepOptions } from '../../src/client/client.js'
import { gaussian } from '../reference.js'
import { MODEL } from '../run/trainer.js'

/** Steps of a training run. */
export const LAST = 12

/** Every parameter's weights, in index order. */
export type Weights = Float32Array[]

// A matrix of many chunks and some milliseconds of Newton-Schulz: its phases are long enough for kills to hit.
const LARGE = { name: 'large', shape: [160, 96], group: 'muon' }
const DECLARED = [LARGE, ...MODEL.parameters]
const [ATTENTION] = MODEL.attentions
const QK = DECLARED.findIndex(({ name }) => name === 'qk')
const NORM = DECLARED.findIndex(({ name }) => name === 'norm')

/** The client's chunk size in bytes, so small that small gradients have several frames too. */
export const CHUNK_BYTES = 1000

/** The weights at the beginning, the same in every run. */
export function firstWeights(): Weights {
  return DECLARED.map(({ shape }, i) => {
    const count = shape.reduce((product, size) => product * size, 1)
    return Float32Array.from(gaussian(i + 1, count))
  })
}

/**
 * The declaration for `open`: every algorithm with every option that keeps state, every layout, and QK-clip. Updates
 * are applied to `weights`.
 */
export function declaration(run: string, weights: Weights): OpenOptions {
  return {
    run,
    groups: MODEL.groups,
    parameters: DECLARED.map((declared, i) => ({ ...declared, data: weights[i] })),
    attentions: [{ ...ATTENTION, query: { parameter: QK }, key: { ...ATTENTION.key, parameter: QK } }],
  }
}

/** A step's gradients. They depend on the weights, so an update lost or applied twice changes every later digest. */
export function gradientsOf(
  weights: Weights,
  step: number,
): { gradients: (Float32Array | undefined)[]; skipped: number[] } {
  const skipped = step % 3 === 0 ? [NORM] : []
  const gradients = weights.map((values, i) => {
    if (skipped.includes(i)) return undefined
    const noise = gaussian(100 * step + i, values.length)
    return values.map((value, at) => value + 0.1 * noise[at])
  })
  return { gradients, skipped }
}

/** A step's own settings: a learning rate, a scale of the gradients and the largest logits. */
export function settingsOf(step: number): StepOptions {
  return {
    groups: { muon: { lr: 0.02 / step } },
    gradient_scale: 1 / (1 + (step % 2)),
    max_logits: { [ATTENTION.name]: [step % 4 === 0 ? -Infinity : 5 + 3 * step, 8] },
  }
}

/** Bytes of all gradients of a step. */
export function gradientBytes(step: number): number {
  const { gradients } = gradientsOf(firstWeights(), step)
  return gradients.reduce((sum, gradient) => sum + (gradient?.byteLength ?? 0), 0)
}

/** A hash of weights, which differs where one bit does. */
export function hashOf(weights: Weights): string {
  const hash = createHash('sha256')
  for (const { buffer, byteOffset, byteLength } of weights) hash.update(Buffer.from(buffer, byteOffset, byteLength))
  return hash.digest('hex')
}
