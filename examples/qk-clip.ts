import type { Plot, Series } from '../src/plot/plot.js'
import { transformerLesson } from './lesson.js'
import { COLOURS, RECIPES } from './recipes.js'
import { markdown } from './report.js'
import { type Example, type Stage, ticks, withService } from './stage.js'
import { rounded, spread } from './statistics.js'
import { last, type Outcome, type Recipe, type Trace, train } from './train.js'
import type { Size } from './transformer.js'

type Settings = {
  size: Size
  /** How many sequences a batch has, and the validation. */
  batch: number
  validation: number
  steps: number
  /** A seed decides the start and the batches of a run; the runs of the first one are drawn. */
  seeds: readonly number[]
  /** The learning rates of the hidden matrices (`lr`) and of the rest of the model. */
  lr: number
  restLr: number
  threshold: number
}

/** The result of a run. Logits are the largest over all heads; `late` ones are of the last quarter of the steps. */
type Summary = {
  title: string
  seed: number
  loss: number
  peakLogit: number
  lateLogit: number
  clippedSteps: number
  lastClipped: number
}

/**
 * The curves of a run: the validation loss, and for each step the largest logit of every head and the clipped heads.
 */
type Drawn = { title: string; curve: [step: number, loss: number][]; logits: number[][]; clippedHeads: number[] }

type Results = { settings: Settings; summaries: Summary[]; drawn: Drawn[] }

/**
 * Trains with Muon at a learning rate that is too large for the attentions, with and without QK-clip (arXiv
 * 2507.20534).
 */
export const qkClip: Example<Settings, Results> = {
  sizes: {
    full: {
      size: { context: 64, width: 64, heads: 4, mlp: [256, 256] },
      batch: 16,
      validation: 64,
      steps: 400,
      seeds: [1, 2, 3],
      lr: 0.08,
      restLr: 0.008,
      threshold: 100,
    },
    // The threshold is one that a model of this size exceeds within its few steps.
    quick: {
      size: { context: 16, width: 16, heads: 2, mlp: [16, 16] },
      batch: 4,
      validation: 4,
      steps: 12,
      seeds: [1],
      lr: 0.3,
      restLr: 0.008,
      threshold: 5,
    },
  },
  measure: (stage, settings) => withService(stage, ({ url }) => measure(stage, settings, url)),
  table,
  plots,
}

const WEIGHT_DECAY = 0.1
const TITLES = { plain: 'Muon', decayed: `Muon, weight decay ${WEIGHT_DECAY}`, clipped: 'MuonClip' } as const

// Weight decay shrinks the same weights as QK-clip, so it is off but in the run that is about it.
function recipesOf({ lr, restLr, threshold }: Settings): Recipe[] {
  const { rest } = RECIPES.adamw(restLr)
  const muon = RECIPES.muon(lr).hidden
  const clip = RECIPES.muonclip(lr).hidden
  return [
    { title: TITLES.plain, hidden: { ...muon, weight_decay: 0 }, rest: { ...rest, weight_decay: 0 } },
    { title: TITLES.decayed, hidden: { ...muon, weight_decay: WEIGHT_DECAY }, rest },
    { title: TITLES.clipped, hidden: { ...clip, weight_decay: 0 }, rest: { ...rest, weight_decay: 0 }, threshold },
  ]
}

async function measure(stage: Stage, settings: Settings, url: string): Promise<Results> {
  const results: Results = { settings, summaries: [], drawn: [] }
  const recipes = recipesOf(settings)
  const tick = ticks(stage, 'qk-clip', settings.seeds.length * recipes.length * settings.steps)
  for (const seed of settings.seeds) {
    const lesson = await transformerLesson({ ...settings, seed, corpus: stage.corpus })
    for (const [i, recipe] of recipes.entries()) {
      const onStep = (_: number, loss: number) => tick(`loss ${loss.toFixed(3)}, ${recipe.title}, seed ${seed}`)
      const outcome = await train(url, lesson, { recipe, name: `qk-clip-${seed}-${i}`, onStep })
      results.summaries.push(summaryOf(outcome, seed))
      if (seed === settings.seeds[0]) results.drawn.push(drawnOf(outcome))
    }
  }
  return results
}

function summaryOf({ recipe, curve, trace }: Outcome, seed: number): Summary {
  const logits = trace.map(largest)
  return {
    title: recipe.title,
    seed,
    loss: rounded(last(curve).loss, 5),
    peakLogit: rounded(Math.max(...logits)),
    lateLogit: rounded(Math.max(...logits.slice(-Math.ceil(logits.length / 4)))),
    clippedSteps: trace.filter(({ clippedHeads }) => clippedHeads > 0).length,
    lastClipped: trace.findLast(({ clippedHeads }) => clippedHeads > 0)?.step ?? 0,
  }
}

function drawnOf({ recipe, curve, trace }: Outcome): Drawn {
  return {
    title: recipe.title,
    curve: curve.map(({ step, loss }) => [step, rounded(loss, 5)]),
    logits: trace.map((step) => headsOf(step).map((logit) => rounded(logit))),
    clippedHeads: trace.map(({ clippedHeads }) => clippedHeads),
  }
}

function headsOf({ maxLogits }: Trace): number[] {
  return Object.values(maxLogits).flat()
}

function largest(step: Trace): number {
  return Math.max(...headsOf(step))
}

function table({ settings, summaries }: Results): string {
  const rows = Object.values(TITLES).map((title) => {
    const runs = summaries.filter((summary) => summary.title === title)
    const each = (key: 'loss' | 'peakLogit' | 'lateLogit' | 'clippedSteps' | 'lastClipped', digits: number) =>
      spread(
        runs.map((run) => run[key]),
        digits,
      )
    const logits = [each('peakLogit', 0), each('lateLogit', 0)]
    const clipped = title === TITLES.clipped ? [each('clippedSteps', 0), each('lastClipped', 0)] : ['', '']
    return [title, each('loss', 3), ...logits, ...clipped]
  })
  const { steps } = settings
  const head = ['', 'final validation loss', 'largest logit', `of the last ${Math.ceil(steps / 4)} steps`]
  return markdown([[...head, `steps of ${steps} with a clip`, 'the last of them'], ...rows])
}

function plots({ settings, drawn }: Results): Plot[] {
  const colours = [COLOURS.muon, COLOURS.adamw, COLOURS.muonclip]
  const lines = (of: (run: Drawn) => Series['points']) =>
    drawn.map((run, i): Series => ({ name: run.title, colour: colours[i], points: of(run) }))
  const clipped = drawn.filter(({ title }) => title === TITLES.clipped)
  const common = { xLabel: 'step', legend: 'line', height: 300 } as const
  const { threshold, lr, seeds } = settings
  const seed = `seed ${seeds[0]}`
  const heads = settings.size.heads * settings.size.mlp.length
  return [
    {
      ...common,
      title: `The largest attention logit of all heads: learning rate ${lr}, ${seed}`,
      yLabel: 'largest softmax input',
      logarithmic: ['y'],
      series: lines(({ logits }) => logits.map((heads, i) => [i + 1, Math.max(...heads)])),
      marks: [{ y: threshold, text: `threshold ${threshold}` }],
    },
    {
      ...common,
      title: 'The loss of the same runs',
      yLabel: 'validation loss',
      series: lines(({ curve }) => curve.slice(1)),
    },
    {
      ...common,
      title: 'γ = threshold / logit of the heads that MuonClip scaled, one dot for each',
      yLabel: 'γ',
      series: clipped.flatMap((run) => gammas(run, settings)),
      marks: [{ y: 1, text: 'γ = 1: left alone' }],
      span: [1, settings.steps],
    },
    {
      ...common,
      title: `How many of the ${heads} heads MuonClip scaled`,
      yLabel: 'heads',
      series: clipped.map(({ clippedHeads }) => ({
        name: 'clipped heads',
        colour: COLOURS.muonclip,
        width: 1,
        points: clippedHeads.map((heads, i): [number, number] => [i + 1, heads]),
      })),
    },
  ]
}

const HEAD_COLOURS = ['#1f5fbf', '#c2571a', '#2f9e5b', '#8a4fbf', '#d9a514', '#d13c6a', '#3aa6b9', '#8a8a8a'] as const

/** A dot for each head and step in which the head was clipped: its γ. */
function gammas({ logits }: Drawn, { size, threshold }: Settings): Series[] {
  return logits[0].map((_, head) => ({
    name: `layer ${Math.floor(head / size.heads)}, head ${head % size.heads}`,
    colour: HEAD_COLOURS[head % HEAD_COLOURS.length],
    drawn: 'dots',
    radius: 2,
    points: logits.flatMap((heads, i): [number, number][] =>
      heads[head] > threshold ? [[i + 1, threshold / heads[head]]] : [],
    ),
  }))
}
