import { writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { linePlot } from '../src/plot/plot.js'
import { type Lesson, perceptronLesson } from './lesson.js'
import { SIZE } from './model.js'
import { progressBar } from './progress.js'
import { best, comparison, conclusion, sweepTable } from './report.js'
import { startService } from './service.js'
import { type Corpus, readCorpus } from './text.js'
import { adamw, last, muon, type Outcome, type Recipe, train } from './train.js'

const USAGE = `node dist/examples/demo.js [--steps 800] [--quick] [--seed 1] [--svg demo.svg] [--sweep]

Trains a small language model of this repository's own sources twice, the optimizer being a service: AdamW for
everything, then Muon for the hidden matrices. --quick takes 20 steps: enough to see that all of it works, too few to
compare anything. --sweep tries the learning rates that the demo's were chosen from.`

/** The learning rates of a sweep. AdamW comes first: its best rate is then AdamW's part of the recipes with Muon. */
const SWEEP = { adamw: [0.002, 0.004, 0.006, 0.008, 0.016], muon: [0.01, 0.02, 0.03, 0.04, 0.08] } as const

/** The best learning rates of `--sweep`. */
const CHOSEN = { adamw: 0.006, muon: 0.02 } as const

/** Of a whole round, and of a quick one. */
const STEPS = { false: '800', true: '20' } as const
const BATCH = 256
const VALIDATION_POSITIONS = 4096
const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const SERVER = fileURLToPath(new URL('../src/server.js', import.meta.url))
const COLOURS = ['#c2571a', '#1f5fbf'] as const

const { values: options } = parseArgs({
  options: {
    steps: { type: 'string' },
    quick: { type: 'boolean', default: false },
    seed: { type: 'string', default: '1' },
    svg: { type: 'string', default: 'demo.svg' },
    sweep: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
})

if (options.help) console.log(USAGE)
else await main()

async function main(): Promise<void> {
  const corpus = readCorpus(ROOT)
  const lesson = await perceptronLesson({
    size: SIZE,
    batch: BATCH,
    validation: VALIDATION_POSITIONS,
    steps: count('steps', options.steps ?? STEPS[`${options.quick}`]),
    seed: count('seed', options.seed),
    corpus,
  })
  console.log(`\n${description(lesson, corpus)}\n`)
  const service = await startService(SERVER)
  if (options.sweep) await sweep(service.url, lesson)
  else await compare(service.url, lesson)
  await service.stop()
}

async function compare(url: string, lesson: Lesson): Promise<void> {
  const baseline = await trainWithBar(url, lesson, adamw(CHOSEN.adamw))
  const outcomes: [Outcome, Outcome] = [baseline, await trainWithBar(url, lesson, muon(CHOSEN.muon, CHOSEN.adamw))]
  writeFileSync(options.svg, plotOf(outcomes))
  console.log(`\n${comparison(outcomes)}\n\n${conclusion(outcomes)}\nBoth curves: ${options.svg}`)
}

async function sweep(url: string, lesson: Lesson): Promise<void> {
  const all = async (recipes: Recipe[]) => {
    const outcomes: Outcome[] = []
    for (const recipe of recipes) outcomes.push(await trainWithBar(url, lesson, recipe))
    return outcomes
  }
  const first = await all(SWEEP.adamw.map(adamw))
  const rest = best(first).recipe.rest.lr
  const second = await all(SWEEP.muon.map((lr) => muon(lr, rest)))
  console.log(`\n${sweepTable([...first, ...second])}`)
}

function trainWithBar(url: string, lesson: Lesson, recipe: Recipe): Promise<Outcome> {
  const { title, hidden } = recipe
  const report = progressBar(`${title}, lr ${hidden.lr}`.padEnd(22), lesson.steps)
  const onStep = (step: number, loss: number) => report(step, `validation loss ${loss.toFixed(3)}`)
  return train(url, lesson, { recipe, name: `demo-${hidden.algorithm}-${hidden.lr}`, onStep })
}

function count(name: string, text: string): number {
  if (/^[1-9]\d{0,8}$/.test(text)) return Number(text)
  throw new RangeError(`--${name} is '${text}', expected a whole number from 1 on`)
}

function description({ model, steps, seed }: Lesson, corpus: Corpus): string {
  const weights = model.weights.reduce((count, { shape: [rows, columns] }) => count + rows * columns, 0)
  const kilobytes = (bytes: Uint8Array) => `${Math.round(bytes.length / 1000)} kB`
  return [
    'A small language model is trained twice. A muond service on this machine computes every step of its optimizer.',
    `Model: ${SIZE.context} bytes of context, ${weights} weights. ${steps} steps of ${BATCH} examples, seed ${seed}.`,
    `Text: ${corpus.files} files of this repository, ${kilobytes(corpus.train)} to train on, ${kilobytes(corpus.validation)} held out.`,
  ].join('\n')
}

function plotOf(outcomes: readonly Outcome[]): string {
  return linePlot({
    title: 'A byte-level language model, trained through muond',
    xLabel: 'step',
    yLabel: 'validation loss, nats per byte',
    series: outcomes.map(({ recipe, curve }, i) => ({
      name: recipe.title,
      colour: COLOURS[i],
      // The high loss before the first steps would press both curves into the lower half of the plot.
      points: curve.slice(1).map(({ step, loss }): [number, number] => [step, loss]),
    })),
    marks: [{ y: last(outcomes[0].curve).loss, text: `${outcomes[0].recipe.title}'s final loss` }],
  })
}
