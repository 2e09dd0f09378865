import { connect } from 'muond/client'
import { newtonSchulzFlops } from '../kernels/flops.js'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../kernels/orthogonalize/coefficients.js'
import type { Plot, Series } from '../src/plot/plot.js'
import { type Lesson, transformerLesson } from './lesson.js'
import { initialWeights, type Weight } from './network.js'
import { markdown } from './report.js'
import { type Example, type Stage, ticks, withService } from './stage.js'
import { median, rounded } from './statistics.js'
import { seededRandom } from './text.js'
import { type Size, transformerFlops } from './transformer.js'

type Settings = {
  /** The widths of the model, and the tokens of its batches, which are multiples of `context`. */
  grid: readonly { width: number; tokens: readonly number[] }[]
  context: number
  headDim: number
  steps: number
}

/** One model and batch. `formula` is ns_steps·m/B; FLOPs are counted, seconds are medians of single cores. */
type Row = {
  width: number
  tokens: number
  formula: number
  flops: { model: number; optimizer: number }
  seconds: Seconds
}

/** Seconds of forward and backward, of the service's computation, and of the whole step as the trainer waits for it. */
type Seconds = { model: number; optimizer: number; step: number }

type Results = { settings: Settings; rows: Row[] }

const NS_STEPS = 5
const COEFFICIENTS = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, NS_STEPS)

/** Measures Muon's cost beside forward and backward over width and batch (Keller Jordan 2024: at most ns_steps·m/B). */
export const overhead: Example<Settings, Results> = {
  sizes: {
    full: {
      grid: [
        { width: 64, tokens: [256, 1024, 4096, 16384] },
        { width: 128, tokens: [256, 1024, 4096, 16384] },
        { width: 256, tokens: [256, 1024, 4096] },
        { width: 512, tokens: [256, 1024, 4096] },
      ],
      context: 64,
      headDim: 32,
      steps: 7,
    },
    quick: {
      grid: [
        { width: 32, tokens: [64, 128] },
        { width: 64, tokens: [64] },
      ],
      context: 32,
      headDim: 16,
      steps: 3,
    },
  },
  measure: (stage, settings) =>
    // One core for the model and one for the optimizer, in turn: seconds then measure work, not parallelism.
    withService(stage, ({ url }) => measure(stage, settings, url), ['--lanes', '1', '--threads', '1']),
  table,
  plots,
}

async function measure(stage: Stage, settings: Settings, url: string): Promise<Results> {
  const rows: Row[] = []
  const models = settings.grid.flatMap(({ width, tokens }) => tokens.map((count) => ({ width, tokens: count })))
  const tick = ticks(stage, 'overhead', models.length * (settings.steps + 1))
  for (const model of models) rows.push(await measureOne(stage, settings, { ...model, url, tick }))
  return { settings, rows }
}

type Place = { url: string; width: number; tokens: number; tick: (note: string) => void }

async function measureOne(stage: Stage, settings: Settings, place: Place): Promise<Row> {
  const { context, headDim, steps } = settings
  const { width, tokens } = place
  const size: Size = { context, width, heads: width / headDim, mlp: [4 * width] }
  const batch = tokens / context
  const lesson = await transformerLesson({
    ...{ size, batch, steps, corpus: stage.corpus },
    ...{ validation: 1, seed: 1, threads: 1 },
  })
  const flops = hiddenOf(lesson).map(({ shape }) => newtonSchulzFlops(COEFFICIENTS, shape))
  return {
    ...{ width, tokens, formula: rounded((NS_STEPS * width) / tokens) },
    flops: { model: transformerFlops(size, batch), optimizer: flops.reduce((sum, each) => sum + each, 0) },
    seconds: await secondsOf(lesson, place),
  }
}

/** Medians over the steps without the first one, which builds sessions and touches fresh memory. */
async function secondsOf(lesson: Lesson, { url, width, tokens, tick }: Place): Promise<Seconds> {
  const random = seededRandom(lesson.seed)
  const weights = initialWeights(lesson.model.weights, random)
  const hidden = hiddenOf(lesson)
  const client = await connect(url)
  const run = await client.open({
    ...{ run: `overhead-${width}-${tokens}`, mode: 'create' },
    groups: [{ name: 'hidden', algorithm: 'muon', ns_steps: NS_STEPS }],
    parameters: hidden.map(({ name, shape }) => {
      return { name, shape: [...shape], group: 'hidden', data: weights[name] }
    }),
  })
  const times: Seconds[] = []
  for (let step = 0; step <= lesson.steps; step++) {
    const batch = lesson.batch(random)
    const started = performance.now()
    const { gradients } = await lesson.model.gradients(weights, batch)
    const computed = performance.now()
    const receipt = await run.step(hidden.map(({ name }) => gradients[name]))
    const ended = performance.now()
    const optimizer = receipt.seconds.compute
    times.push({ model: (computed - started) / 1000, optimizer, step: (ended - computed) / 1000 })
    tick(`${(ended - started).toFixed(0)} ms, width ${width}, ${tokens} tokens`)
  }
  await client.close()
  const each = (key: keyof Seconds) => rounded(median(times.slice(1).map((time) => time[key])))
  return { model: each('model'), optimizer: each('optimizer'), step: each('step') }
}

function hiddenOf({ model }: Lesson): Weight[] {
  return model.weights.filter(({ hidden }) => hidden)
}

function table({ rows }: Results): string {
  const cells = rows.map(({ width, tokens, formula, flops, seconds }) => [
    String(width),
    String(tokens),
    percent(formula),
    percent(flops.optimizer / flops.model),
    percent(seconds.optimizer / seconds.model),
    percent(seconds.step / seconds.model),
    milliseconds(seconds.model),
    milliseconds(seconds.optimizer),
    milliseconds(seconds.step),
  ])
  const shares = ['`ns_steps·m/B`', 'FLOPs', 'computing', 'whole step']
  return markdown([['width m', 'tokens B', ...shares, 'model, ms', 'computing, ms', 'whole step, ms'], ...cells])
}

const percent = (share: number): string => `${rounded(100 * share, share < 0.1 ? 2 : 3)} %`
const milliseconds = (seconds: number): string => (1000 * seconds).toFixed(1)

function plots({ rows }: Results): Plot[] {
  const widths = [...new Set(rows.map(({ width }) => width))]
  // Each width has a line, which falls as the batch grows.
  const lines = (name: string, colour: string, share: (row: Row) => number) =>
    widths.map((width): Series => {
      const points = rows.filter((row) => row.width === width).map((row): [number, number] => [row.formula, share(row)])
      return { name, colour, points, drawn: 'both', width: 1 }
    })
  const ends = [Math.min, Math.max].map((end) => end(...rows.map(({ formula }) => formula)))
  return [
    {
      title: "Muon's share of forward and backward, a line for each width m",
      xLabel: `ns_steps · m / B, B tokens of a batch; m is ${widths.join(', ')}`,
      yLabel: 'share of forward and backward',
      series: [
        { name: 'ns_steps·m/B', colour: '#aaaaaa', points: ends.map((end) => [end, end]) },
        ...lines('FLOPs', '#1f5fbf', ({ flops }) => flops.optimizer / flops.model),
        ...lines('seconds of computing', '#c2571a', ({ seconds }) => seconds.optimizer / seconds.model),
        ...lines('seconds of the whole step', '#d9a514', ({ seconds }) => seconds.step / seconds.model),
      ],
      logarithmic: ['x', 'y'],
      legend: 'line',
    },
  ]
}
