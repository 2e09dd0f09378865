import { connect, type Run } from 'muond/client'
import type { Attention, Lesson } from './lesson.js'
import { initialWeights, type MaxLogits, type Tensors, type Weight } from './network.js'
import { seededRandom } from './text.js'

/** The settings of a group: the keys of a group of `open` but its name. */
export type GroupSettings = { algorithm: string; lr: number; [hyperparameter: string]: unknown }

/** The optimizers of the hidden matrices and of the rest, embedding and head; `threshold` turns QK-clip on. */
export type Recipe = { title: string; hidden: GroupSettings; rest: GroupSettings; threshold?: number }

/** The validation loss in nats per byte after `step` steps, which took `seconds` without evaluations. */
export type Evaluation = { step: number; seconds: number; loss: number }

/** A step: the loss and the largest logits of its batch before the update, and how many heads QK-clip scaled. */
export type Trace = { step: number; loss: number; maxLogits: MaxLogits; clippedHeads: number }

/**
 * The result of a run. `updateRms` is the RMS of updates before the learning rate, averaged over the evaluated steps.
 */
export type Outcome = {
  recipe: Recipe
  curve: Evaluation[]
  trace: Trace[]
  updateRms: ByGroup
  milliseconds: { model: number; service: number }
}

type ByGroup = { hidden: number; rest: number }

const EVALUATIONS = 40

/** AdamW for every weight. */
export function adamw(lr: number): Recipe {
  return { title: 'AdamW', hidden: adamwGroup(lr), rest: adamwGroup(lr) }
}

/** Muon for the hidden matrices, and AdamW for the embedding and the head, which Muon is not meant for. */
export function muon(lr: number, rest: number): Recipe {
  return { title: 'Muon + AdamW', hidden: { algorithm: 'muon', lr, weight_decay: 0 }, rest: adamwGroup(rest) }
}

// Weight decay is off in all recipes: over so few steps it would only be one more thing to tune.
export function adamwGroup(lr: number): GroupSettings {
  return { algorithm: 'adamw', lr, betas: [0.9, 0.95], weight_decay: 0 }
}

/**
 * Trains by `recipe` in the run `name` of the service at `url`. The lesson's seed gives every recipe the same start
 * and the same batches; learning rates fall linearly to 0. `onStep` is called after every step with the latest
 * validation loss.
 */
export async function train(
  url: string,
  lesson: Lesson,
  { recipe, name, onStep }: { recipe: Recipe; name: string; onStep: (step: number, loss: number) => void },
): Promise<Outcome> {
  const random = seededRandom(lesson.seed)
  const weights = initialWeights(lesson.model.weights, random)
  const client = await connect(url)
  const run = await client.open({ run: name, mode: 'create', ...declaration(lesson, recipe, weights) })
  const measured = { spent: { model: 0, service: 0 }, curve: [], trace: [], updates: [] }
  const training = { ...lesson, ...measured, recipe, random, weights, run }
  await evaluate(training, 0)
  for (let step = 1; step <= lesson.steps; step++) {
    await takeStep(training, step)
    onStep(step, last(training.curve).loss)
  }
  await client.close()
  return outcome(training)
}

/** A run of a lesson in progress: its weights, and the measurements so far. */
type Training = Lesson & {
  recipe: Recipe
  random: () => number
  weights: Tensors
  run: Run
  /** Milliseconds. */
  spent: { model: number; service: number }
  curve: Evaluation[]
  trace: Trace[]
  updates: ByGroup[]
}

// A whole trainer: take a batch, compute its gradients, and step through the service, which changes the weights.
async function takeStep(training: Training, step: number): Promise<void> {
  const { model, weights, run, spent, steps, recipe } = training
  const evaluated = Math.floor((step * EVALUATIONS) / steps) > Math.floor(((step - 1) * EVALUATIONS) / steps)
  const before = evaluated ? copyOf(weights) : undefined
  const groups = groupsAt(recipe, 1 - (step - 1) / steps)
  const batch = training.batch(training.random)

  const started = performance.now()
  const { loss, gradients, maxLogits } = await model.gradients(weights, batch)
  const computed = performance.now()
  const clip = recipe.threshold === undefined ? {} : { max_logits: maxLogits }
  const { clipped_heads } = await run.step(gradients, { groups, ...clip })
  spent.model += computed - started
  spent.service += performance.now() - computed

  training.trace.push({ step, loss, maxLogits, clippedHeads: sum(Object.values(clipped_heads)) })
  if (before === undefined) return
  training.updates.push(updateRms(training, before, groups))
  await evaluate(training, step)
}

async function evaluate({ model, weights, validation, curve, spent }: Training, step: number): Promise<void> {
  const loss = await model.loss(weights, validation)
  curve.push({ step, seconds: (spent.model + spent.service) / 1000, loss })
}

/** `groups`, `parameters` and `attentions` of the open frame. */
function declaration({ model, attentions }: Lesson, { hidden, rest, threshold }: Recipe, weights: Tensors) {
  const index = (name: string) => model.weights.findIndex((weight) => weight.name === name)
  const clipped = ({ name, heads, headDim, query, key }: Attention) => ({
    ...{ name, threshold, query_heads: heads, head_dim: headDim },
    ...{ query: { parameter: index(query) }, key: { parameter: index(key) } },
  })
  return {
    groups: [
      { name: 'hidden', ...hidden },
      { name: 'rest', ...rest },
    ],
    parameters: model.weights.map((weight) => {
      return { name: weight.name, shape: [...weight.shape], group: groupOf(weight), data: weights[weight.name] }
    }),
    ...(threshold !== undefined && { attentions: attentions.map(clipped) }),
  }
}

function groupsAt({ hidden, rest }: Recipe, remaining: number) {
  return { hidden: { lr: hidden.lr * remaining }, rest: { lr: rest.lr * remaining } }
}

function groupOf({ hidden }: Weight): keyof ByGroup {
  return hidden ? 'hidden' : 'rest'
}

/** Root mean square of (W after - W before) / lr over all elements of each group: without weight decay, the update. */
function updateRms({ model, weights }: Training, before: Tensors, groups: ReturnType<typeof groupsAt>): ByGroup {
  const rms = (group: keyof ByGroup) => {
    const names = model.weights.filter((weight) => groupOf(weight) === group).map(({ name }) => name)
    const squares = names.map((name) => squaredDistance(weights[name], before[name]))
    return Math.sqrt(sum(squares) / sum(names.map((name) => weights[name].length))) / groups[group].lr
  }
  return { hidden: rms('hidden'), rest: rms('rest') }
}

function outcome({ recipe, curve, trace, updates, spent, steps }: Training): Outcome {
  const mean = (group: keyof ByGroup) => sum(updates.map((update) => update[group])) / updates.length
  return {
    recipe,
    curve,
    trace,
    updateRms: { hidden: mean('hidden'), rest: mean('rest') },
    milliseconds: { model: spent.model / steps, service: spent.service / steps },
  }
}

/** The last evaluation; a curve has at least the one before the first step. */
export function last(curve: readonly Evaluation[]): Evaluation {
  return curve[curve.length - 1]
}

function copyOf(weights: Tensors): Tensors {
  return Object.fromEntries(Object.entries(weights).map(([name, values]) => [name, values.slice()]))
}

function squaredDistance(one: Float32Array, other: Float32Array): number {
  return one.reduce((total, value, i) => total + (value - other[i]) ** 2, 0)
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
