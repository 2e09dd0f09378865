import { loadModel, type Size as PerceptronSize } from './model.js'
import type { Model } from './network.js'
import { type Corpus, type Examples, examplesAt, fixedPositions, randomPositions, windowsAt } from './text.js'
import { attentionsOf, loadTransformer, type Size as TransformerSize } from './transformer.js'

/** An attention by the names of the weights that make its queries and keys; their rows are head-major. */
export type Attention = { name: string; heads: number; headDim: number; query: string; key: string }

/** A model with its text, ready to be trained any number of times. */
export type Lesson = {
  model: Model
  attentions: readonly Attention[]
  steps: number
  seed: number
  /** A batch to learn from, with tokens and targets as the model takes them. */
  batch: (random: () => number) => Examples
  /** The validation of every run, in whole batches because a graph's batch is fixed. */
  validation: Examples
}

type Course<Size> = { size: Size; batch: number; steps: number; seed: number; corpus: Corpus; validation: number }

/** The demo's model. `batch` and `validation` count examples, each a context and the byte behind it. */
export async function perceptronLesson(course: Course<PerceptronSize>): Promise<Lesson> {
  const { size, batch } = course
  return { ...lessonOf(course, examplesAt), model: await loadModel(size, batch), attentions: [] }
}

/** The transformer. `batch` and `validation` count sequences of `size.context` bytes; `threads` as in `loadNetwork`. */
export async function transformerLesson(course: Course<TransformerSize> & { threads?: number }): Promise<Lesson> {
  const { size, batch, threads } = course
  const model = await loadTransformer(size, batch, threads)
  return { ...lessonOf(course, windowsAt), model, attentions: attentionsOf(size) }
}

type Cut = (bytes: Uint8Array, positions: Int32Array, context: number) => Examples

function lessonOf<Size extends { context: number }>(course: Course<Size>, cut: Cut) {
  const { corpus, batch, steps, seed } = course
  const { context } = course.size
  const count = Math.ceil(course.validation / batch) * batch
  const positions = fixedPositions(corpus.validation, { count, context })
  return {
    steps,
    seed,
    batch: (random: () => number) =>
      cut(corpus.train, randomPositions(random, corpus.train, { count: batch, context }), context),
    validation: cut(corpus.validation, positions, context),
  }
}
