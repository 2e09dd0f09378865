import { connect, type Run } from 'muond/client'
import { initialWeights, loadModel, type Model, type Size, type Tensors, type Weight, weightsOf } from './model.js'
import { type Corpus, type Examples, examplesAt, fixedPositions, randomPositions, seededRandom } from './text.js'

/** What every run of a comparison shares: the model, the text, the seed and the number of steps. */
export type Course = { size: Size; steps: number; batch: number; seed: number; corpus: Corpus }

/** A course with its graphs loaded and its validation examples cut: ready to be run any number of times. */
export type Lesson = Course & { model: Model; validation: Examples }

/** The hyperparameters of one group, as the service takes them. */
export type Group = { algorithm: 'adamw' | 'muon'; lr: number; weight_decay: number; betas?: [number, number] }

/** Which optimizer updates the hidden matrices and which the embedding and the head. */
export type Recipe = { title: string; hidden: Group; rest: Group }

/** `loss` in nats per byte after `step` steps that took `seconds`, evaluations not counted. */
export type Evaluation = { step: number; seconds: number; loss: number }

/** What a run came to; RMS is that of an update before its learning rate, averaged over the evaluated steps. */
export type Outcome = {
  recipe: Recipe
  curve: Evaluation[]
  updateRms: ByGroup
  milliseconds: { model: number; service: number }
}

type ByGroup = { hidden: number; rest: number }

const VALIDATION_POSITIONS = 4096
const EVALUATIONS = 40

/** AdamW for every weight. */
export function adamw(lr: number): Recipe {
  return { title: 'AdamW', hidden: adamwGroup(lr), rest: adamwGroup(lr) }
}

/** Muon for the hidden matrices and AdamW for what Muon is not meant for: the embedding and the head. */
export function muon(lr: number, rest: number): Recipe {
  return { title: 'Muon + AdamW', hidden: { algorithm: 'muon', lr, weight_decay: 0 }, rest: adamwGroup(rest) }
}

// Weight decay is off on both sides: over so few steps it would only be one more thing to tune.
function adamwGroup(lr: number): Group {
  return { algorithm: 'adamw', lr, betas: [0.9, 0.95], weight_decay: 0 }
}

/** Loads the model's graphs and cuts the validation examples, in whole batches because a graph's batch is fixed. */
export async function prepare(course: Course): Promise<Lesson> {
  const { size, batch, corpus } = course
  const count = Math.ceil(VALIDATION_POSITIONS / batch) * batch
  const positions = fixedPositions(corpus.validation, { count, context: size.context })
  const validation = examplesAt(corpus.validation, positions, size.context)
  return { ...course, model: await loadModel(size, batch), validation }
}

/**
 * Trains as `recipe` says, in a run called `name` of the service at `url`. The lesson's seed gives every recipe the same start and
 * the same batches; the learning rates fall linearly to 0. `onStep` hears of every step and the latest validation loss.
 */
export async function train(
  url: string,
  lesson: Lesson,
  { recipe, name, onStep }: { recipe: Recipe; name: string; onStep: (step: number, loss: number) => void },
): Promise<Outcome> {
  const random = seededRandom(lesson.seed)
  const weights = initialWeights(lesson.size, random)
  const client = await connect(url)
  const run = await client.open({ run: name, mode: 'create', ...declaration(lesson, recipe, weights) })
  const training = { ...lesson, recipe, random, weights, run, spent: { model: 0, service: 0 }, curve: [], updates: [] }
  await evaluate(training, 0)
  for (let step = 1; step <= lesson.steps; step++) {
    await takeStep(training, step)
    onStep(step, last(training.curve).loss)
  }
  await client.close()
  return outcome(training)
}

/** One run of a lesson: its weights as they are now and what was measured so far. */
type Training = Lesson & {
  recipe: Recipe
  random: () => number
  weights: Tensors
  run: Run
  /** Milliseconds. */
  spent: { model: number; service: number }
  curve: Evaluation[]
  updates: ByGroup[]
}

// This is the whole of a trainer: a batch, its gradients, and the step through the service, which changes the weights.
async function takeStep(training: Training, step: number): Promise<void> {
  const { model, weights, run, spent, steps } = training
  const evaluated = Math.floor((step * EVALUATIONS) / steps) > Math.floor(((step - 1) * EVALUATIONS) / steps)
  const before = evaluated ? copyOf(weights) : undefined
  const groups = groupsAt(training.recipe, 1 - (step - 1) / steps)

  const started = performance.now()
  const { gradients } = await model.gradients(weights, nextBatch(training))
  const computed = performance.now()
  await run.step(gradients, { groups })
  spent.model += computed - started
  spent.service += performance.now() - computed

  if (before === undefined) return
  training.updates.push(updateRms(training, before, groups))
  await evaluate(training, step)
}

async function evaluate({ model, weights, validation, curve, spent }: Training, step: number): Promise<void> {
  const loss = await model.loss(weights, validation)
  curve.push({ step, seconds: (spent.model + spent.service) / 1000, loss })
}

function nextBatch({ random, corpus, batch, size }: Training): Examples {
  const positions = randomPositions(random, corpus.train, { count: batch, context: size.context })
  return examplesAt(corpus.train, positions, size.context)
}

/** `groups` and `parameters` of the open frame. */
function declaration({ size }: Lesson, { hidden, rest }: Recipe, weights: Tensors) {
  return {
    groups: [
      { name: 'hidden', ...hidden },
      { name: 'rest', ...rest },
    ],
    parameters: weightsOf(size).map((weight) => {
      return { name: weight.name, shape: [...weight.shape], group: groupOf(weight), data: weights[weight.name] }
    }),
  }
}

function groupsAt({ hidden, rest }: Recipe, remaining: number) {
  return { hidden: { lr: hidden.lr * remaining }, rest: { lr: rest.lr * remaining } }
}

function groupOf({ hidden }: Weight): keyof ByGroup {
  return hidden ? 'hidden' : 'rest'
}

/** Root mean square of (W after - W before) / lr over all elements of each group: without weight decay, the update. */
function updateRms({ size, weights }: Training, before: Tensors, groups: ReturnType<typeof groupsAt>): ByGroup {
  const rms = (group: keyof ByGroup) => {
    const names = weightsOf(size)
      .filter((weight) => groupOf(weight) === group)
      .map(({ name }) => name)
    const squares = names.map((name) => squaredDistance(weights[name], before[name]))
    return Math.sqrt(sum(squares) / sum(names.map((name) => weights[name].length))) / groups[group].lr
  }
  return { hidden: rms('hidden'), rest: rms('rest') }
}

function outcome({ recipe, curve, updates, spent, steps }: Training): Outcome {
  const mean = (group: keyof ByGroup) => sum(updates.map((update) => update[group])) / updates.length
  return {
    recipe,
    curve,
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
