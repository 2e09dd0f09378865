import type { Plot, Series } from '../src/plot/plot.js'
import { type Lesson, transformerLesson } from './lesson.js'
import { COLOURS, RECIPE_NAMES, RECIPES, type RecipeName } from './recipes.js'
import { markdown } from './report.js'
import { type Example, type Stage, ticks, withService } from './stage.js'
import { mean, rounded, spread } from './statistics.js'
import { last, type Outcome, train } from './train.js'
import type { Size } from './transformer.js'

type Settings = {
  size: Size
  /** How many sequences a batch has, and the validation. */
  batch: number
  validation: number
  steps: number
  /** The learning rates are chosen with one seed and compared with others. */
  sweepSeed: number
  seeds: readonly number[]
  /** The learning rates of the sweep, equally many for each optimizer. */
  rates: Readonly<Record<RecipeName, readonly number[]>>
}

/** A run of the comparison; `logit` is the largest logit of all heads and steps. */
type Run = {
  optimizer: RecipeName
  seed: number
  lr: number
  curve: { step: number; seconds: number; loss: number }[]
  logit: number
}

type Tried = { optimizer: RecipeName; lr: number; loss: number }
type Results = { settings: Settings; sweep: Tried[]; runs: Run[] }

const BASELINE = 'adamw'

/** Measures how many steps and seconds each optimizer needs to reach the loss at which AdamW ends. */
export const efficiency: Example<Settings, Results> = {
  sizes: {
    full: {
      size: { context: 64, width: 64, heads: 4, mlp: [256, 256] },
      batch: 16,
      validation: 64,
      steps: 400,
      sweepSeed: 1,
      seeds: [2, 3, 4],
      rates: {
        sgd: [0.05, 0.1, 0.2, 0.4, 0.8],
        adam: [0.002, 0.004, 0.008, 0.016, 0.032],
        adamw: [0.002, 0.004, 0.008, 0.016, 0.032],
        muon: [0.005, 0.01, 0.02, 0.04, 0.08],
        muonclip: [0.005, 0.01, 0.02, 0.04, 0.08],
      },
    },
    quick: {
      size: { context: 16, width: 16, heads: 2, mlp: [32] },
      batch: 4,
      validation: 4,
      steps: 10,
      sweepSeed: 1,
      seeds: [2, 3],
      rates: {
        sgd: [0.1, 1e-6],
        adam: [0.008, 0.016],
        adamw: [0.008, 0.016],
        muon: [0.02, 0.04],
        muonclip: [0.02, 0.04],
      },
    },
  },
  measure: (stage, settings) => withService(stage, ({ url }) => measure(stage, settings, url)),
  table: (results) => `${comparison(results)}\n\n${sweepTable(results)}`,
  plots,
}

async function measure(stage: Stage, settings: Settings, url: string): Promise<Results> {
  const { sweepSeed, seeds, rates } = settings
  const tried = RECIPE_NAMES.flatMap((name) => rates[name]).length
  const tick = ticks(stage, 'efficiency', (tried + seeds.length * RECIPE_NAMES.length) * settings.steps)
  const prepare = (seed: number) => transformerLesson({ ...settings, seed, corpus: stage.corpus })
  const trained = async (lesson: Lesson, optimizer: RecipeName, lr: number) => {
    const onStep = (_: number, loss: number) => tick(`loss ${loss.toFixed(3)}, ${optimizer} ${lr}, seed ${lesson.seed}`)
    const name = `efficiency-${optimizer}-${lr}-${lesson.seed}`
    return train(url, lesson, { recipe: RECIPES[optimizer](lr), name, onStep })
  }
  const sweep: Tried[] = []
  const first = await prepare(sweepSeed)
  for (const optimizer of RECIPE_NAMES) {
    for (const lr of rates[optimizer]) {
      const { curve } = await trained(first, optimizer, lr)
      sweep.push({ optimizer, lr, loss: rounded(last(curve).loss, 5) })
    }
  }
  const runs: Run[] = []
  // The optimizers take turns within a seed, so that other work on the machine disturbs all of them alike.
  for (const seed of seeds) {
    const lesson = await prepare(seed)
    for (const optimizer of RECIPE_NAMES) {
      const { lr } = best(sweep, optimizer)
      runs.push({ optimizer, seed, lr, ...figuresOf(await trained(lesson, optimizer, lr)) })
    }
  }
  return { settings, sweep, runs }
}

function best(sweep: readonly Tried[], optimizer: RecipeName): Tried {
  const tried = sweep.filter((one) => one.optimizer === optimizer)
  return tried.reduce((one, other) => (other.loss < one.loss ? other : one))
}

function figuresOf({ curve, trace }: Outcome) {
  return {
    curve: curve.map(({ step, seconds, loss }) => ({ step, seconds: rounded(seconds), loss: rounded(loss, 5) })),
    logit: rounded(Math.max(...trace.flatMap(({ maxLogits }) => Object.values(maxLogits).flat()))),
  }
}

function comparison({ runs }: Results): string {
  const rows = RECIPE_NAMES.map((optimizer) => {
    const ours = runs.filter((run) => run.optimizer === optimizer)
    const losses = ours.map(({ curve }) => last(curve).loss)
    const logits = ours.map(({ logit }) => logit)
    const name = [RECIPES[optimizer](0).title, String(ours[0].lr)]
    return [...name, spread(losses, 3), ...arrivals(ours, runs), spread(logits, 0)]
  })
  const goal = ["steps to AdamW's final loss", 'seconds to it', "of AdamW's seconds"]
  return markdown([['', 'lr', 'final validation loss', ...goal, 'largest logit'], ...rows])
}

/**
 * Steps, seconds and seconds per AdamW's until each run has the loss that AdamW of its seed ends with, if all reach
 * it.
 */
function arrivals(ours: readonly Run[], runs: readonly Run[]): string[] {
  const reached = ours.flatMap(({ seed, curve }) => {
    const [baseline] = runs.filter((run) => run.optimizer === BASELINE && run.seed === seed)
    const goal = last(baseline.curve)
    const at = curve.find(({ loss }) => loss <= goal.loss)
    return at === undefined ? [] : [{ ...at, share: at.seconds / goal.seconds }]
  })
  if (reached.length < ours.length) return Array(3).fill(`${reached.length} of ${ours.length} runs`)
  const each = (key: 'step' | 'seconds' | 'share', digits: number) =>
    spread(
      reached.map((one) => one[key]),
      digits,
    )
  return [each('step', 0), each('seconds', 1), each('share', 2)]
}

function sweepTable({ settings, sweep }: Results): string {
  const rows = RECIPE_NAMES.map((optimizer) => {
    const chosen = best(sweep, optimizer)
    const cells = sweep
      .filter((one) => one.optimizer === optimizer)
      .map((one) => {
        const text = `${one.loss.toFixed(3)} at ${one.lr}`
        return one === chosen ? `**${text}**` : text
      })
    return [RECIPES[optimizer](0).title, ...cells]
  })
  const { steps, sweepSeed, rates } = settings
  const head = [`final loss after ${steps} steps, seed ${sweepSeed}`, ...rates[BASELINE].map(() => '')]
  return markdown([head, ...rows])
}

function plots({ runs }: Results): Plot[] {
  const lines = (x: 'step' | 'seconds') =>
    runs.map(({ optimizer, curve }): Series => {
      const points = curve.slice(2).map((point): [number, number] => [point[x], point.loss])
      return { name: RECIPES[optimizer](0).title, colour: COLOURS[optimizer], width: 1.5, points }
    })
  const target = mean(runs.filter(({ optimizer }) => optimizer === BASELINE).map(({ curve }) => last(curve).loss))
  const common = { yLabel: 'validation loss, nats per byte', legend: 'line', height: 360 } as const
  const marks = [{ y: target, text: "AdamW's final loss" }]
  return [
    { ...common, title: 'Every run of each optimizer, over steps', xLabel: 'step', series: lines('step'), marks },
    {
      ...common,
      title: 'The same over the seconds of forward, backward and service',
      xLabel: 'seconds',
      series: lines('seconds'),
      marks,
    },
  ]
}
