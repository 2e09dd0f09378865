import { connect, type Run } from 'muond/client'
import type { Plot, Series } from '../src/plot/plot.js'
import { type Lesson, transformerLesson } from './lesson.js'
import { initialWeights, type Tensors, type Weight } from './network.js'
import { markdown } from './report.js'
import { type Example, type Stage, ticks, withService } from './stage.js'
import { mean, rms, rounded } from './statistics.js'
import { seededRandom } from './text.js'
import type { Size } from './transformer.js'

/** A model, which gives the shapes of matrices to measure. */
type Course = { size: Size; batch: number }

type Settings = {
  courses: readonly Course[]
  steps: number
  /** Steps before the first that counts: while AdamW's averages are young, its updates have an RMS near 1. */
  warmup: number
  seed: number
  /** The learning rate of AdamW, whose updates move the weights. */
  lr: number
}

/** The RMS, by optimizer, of the updates of all matrices of one shape, before the learning rate. */
type Row = { shape: readonly [number, number]; matrices: number; rms: Record<string, number> }

type Results = { settings: Settings; rows: Row[] }

const ADAMW = 'AdamW'
const ADJUSTMENTS = ['original', 'match_rms_adamw', 'rms:0.18', 'spectral', 'none'] as const

// Five iterations leave singular values below 0.003 of the norm too small; twelve lift all that matter.
const MORE_ITERATIONS = {
  name: 'match_rms_adamw, 12 iterations',
  adjust_lr_fn: 'match_rms_adamw',
  ns_steps: 12,
} as const
const OPTIMIZERS = [ADAMW, ...ADJUSTMENTS, MORE_ITERATIONS.name] as const

/**
 * Measures Muon's updates under each `adjust_lr_fn` beside AdamW's of the same gradients, by shape (arXiv
 * 2502.16982).
 */
export const updateRms: Example<Settings, Results> = {
  sizes: {
    full: {
      courses: [
        { size: { context: 64, width: 64, heads: 4, mlp: [64, 256, 1024] }, batch: 16 },
        { size: { context: 64, width: 256, heads: 4, mlp: [1024] }, batch: 16 },
      ],
      steps: 60,
      warmup: 20,
      seed: 1,
      lr: 0.004,
    },
    quick: {
      courses: [{ size: { context: 16, width: 32, heads: 2, mlp: [32, 128] }, batch: 4 }],
      steps: 6,
      warmup: 2,
      seed: 1,
      lr: 0.004,
    },
  },
  measure: (stage, settings) =>
    withService(stage, async ({ url }) => {
      const rows: Row[] = []
      const tick = ticks(stage, 'update-rms', settings.courses.length * settings.steps)
      const place = { url, corpus: stage.corpus, tick }
      for (const course of settings.courses) rows.push(...(await measure({ ...settings, ...course }, place)))
      return { settings, rows }
    }),
  table,
  plots,
}

type Place = { url: string; corpus: Stage['corpus']; tick: (note: string) => void }
type Shadow = { optimizer: string; weight: Weight; data: Float32Array; rms: number[] }

/**
 * Every optimizer gets the gradients of one training, and adds its updates, with a learning rate of 1, to zeros,
 * which are then the updates themselves. AdamW's updates also move the weights.
 */
async function measure(settings: Settings & Course, { url, corpus, tick }: Place): Promise<Row[]> {
  const { size, steps, warmup, seed, lr } = settings
  const lesson = await transformerLesson({ ...settings, validation: 1, corpus })
  const random = seededRandom(seed)
  const weights = initialWeights(lesson.model.weights, random)
  const shadows = shadowsOf(lesson)
  const client = await connect(url)
  const run = await client.open({ run: `update-rms-${size.width}`, mode: 'create', ...declaration(shadows) })
  for (let step = 1; step <= steps; step++) {
    const { loss, gradients } = await lesson.model.gradients(weights, lesson.batch(random))
    await takeStep(run, shadows, gradients)
    if (step > warmup) for (const shadow of shadows) shadow.rms.push(rms(shadow.data))
    for (const { optimizer, weight, data } of shadows) if (optimizer === ADAMW) add(weights[weight.name], data, lr)
    tick(`loss ${loss.toFixed(3)}, width ${size.width}`)
  }
  await client.close()
  return rowsOf(shadows)
}

/** The optimizers: AdamW for the whole model, and Muon for its hidden matrices, once for each adjustment. */
function shadowsOf({ model }: Lesson): Shadow[] {
  return OPTIMIZERS.flatMap((optimizer) => {
    const taken = model.weights.filter(({ hidden }) => hidden || optimizer === ADAMW)
    return taken.map((weight) => {
      return { optimizer, weight, data: new Float32Array(weight.shape[0] * weight.shape[1]), rms: [] }
    })
  })
}

function declaration(shadows: readonly Shadow[]) {
  const common = { lr: 1, weight_decay: 0 }
  return {
    groups: [
      { name: ADAMW, algorithm: 'adamw', betas: [0.9, 0.95], ...common },
      ...ADJUSTMENTS.map((name) => ({ name, algorithm: 'muon', adjust_lr_fn: name, ...common })),
      { ...MORE_ITERATIONS, algorithm: 'muon', ...common },
    ],
    parameters: shadows.map(({ optimizer, weight, data }) => {
      return { name: `${optimizer}/${weight.name}`, shape: [...weight.shape], group: optimizer, data }
    }),
  }
}

async function takeStep(run: Run, shadows: readonly Shadow[], gradients: Tensors): Promise<void> {
  for (const { data } of shadows) data.fill(0)
  await run.step(shadows.map(({ weight }) => gradients[weight.name]))
}

function add(weights: Float32Array, changes: Float32Array, lr: number): void {
  changes.forEach((change, i) => {
    weights[i] += lr * change
  })
}

function rowsOf(shadows: readonly Shadow[]): Row[] {
  const hidden = shadows.filter(({ weight }) => weight.hidden)
  const nameOf = ({ weight }: Shadow) => weight.shape.join(' x ')
  return [...new Set(hidden.map(nameOf))].map((name) => {
    const same = hidden.filter((shadow) => nameOf(shadow) === name)
    const rms = OPTIMIZERS.map((optimizer) => {
      const values = same.filter((shadow) => shadow.optimizer === optimizer).flatMap((shadow) => shadow.rms)
      return [optimizer, rounded(mean(values))]
    })
    return { shape: same[0].weight.shape, matrices: same.length / OPTIMIZERS.length, rms: Object.fromEntries(rms) }
  })
}

function table({ rows }: Results): string {
  const cells = rows.map(({ shape, matrices, rms }) => {
    return [shape.join(' x '), String(matrices), ...OPTIMIZERS.map((optimizer) => rms[optimizer].toFixed(3))]
  })
  return markdown([['shape', 'matrices', ...OPTIMIZERS], ...cells])
}

const COLOURS = ['#c2571a', '#8a8a8a', '#1f5fbf', '#3aa6b9', '#8a4fbf', '#d9a514', '#2f9e5b'] as const

function plots({ rows }: Results): Plot[] {
  const series = OPTIMIZERS.map((optimizer, i): Series => {
    const points = rows.map(({ rms }, row): [number, number] => [row, rms[optimizer]])
    return { name: optimizer, colour: COLOURS[i], points, drawn: 'both', width: 1 }
  })
  return [
    {
      title: 'RMS of updates of the same gradients, before the learning rate',
      xLabel: 'shape of the matrix, rows x columns; dashed: what match_rms_adamw aims at',
      yLabel: 'update RMS',
      series,
      names: rows.map(({ shape }) => shape.join(' x ')),
      logarithmic: ['y'],
      legend: 'line',
      marks: [{ y: 0.2, text: '0.2' }],
    },
  ]
}
