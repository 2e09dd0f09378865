import { mkdtemp, open, readdir, rm, writeFile } from 'node:fs/promises'
import { cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { GPT2, gradientBytes, SMALL, stateBytes, transformer } from './models.js'
import { memory, resetPeak, startService } from './process.js'
import { median } from './report.js'
import { startTrainer, type Trainer } from './trainer.js'

/**
 * `npm run bench:durability`: measures what checkpoints, the journal and a restore cost on this machine's CPU and
 * disk. The model is GPT-2 124M under adamw, with 1 GB of state. Writes bench/results/durability.json. `--quick`
 * takes a small model, `--data` another disk.
 */
const { values: flags } = parseArgs({
  options: { quick: { type: 'boolean', default: false }, data: { type: 'string', default: tmpdir() } },
})
const model = transformer(flags.quick ? SMALL : GPT2, { hidden: 'adamw', rest: 'adamw', dtype: 'bfloat16' })
const ROUNDS = 5
const STEPS = 3
// The bounds, stated before anything was measured.
const MOST_SLOWER = 1.25
const LEAST_OF_DISK = 0.5
const SPARE_BYTES = 64 * 2 ** 20

const data = await mkdtemp(join(flags.data, 'muond-bench-'))
try {
  const state = stateBytes(model)
  console.log(
    `${model.name}: ${mega(state)} MB of state, ${mega(gradientBytes(model))} MB of gradients a step; ${cpus()[0]?.model}, load ${loadavg()[0]}`,
  )
  const checkpoints = await measureCheckpoints(join(data, 'checkpoints'))
  const journal = await measureJournal()
  const restore = await measureRestore(join(data, 'checkpoints'))
  const verdicts = [
    verdict('a step while a checkpoint is written, over one without', checkpoints.ratio, MOST_SLOWER, 'at most'),
    verdict('memory that a checkpoint takes, MB', mega(checkpoints.extra_bytes), mega(state + SPARE_BYTES), 'at most'),
    verdict("restore, of the disk's sequential read", restore.ratio, LEAST_OF_DISK, 'at least'),
  ]
  console.log(`a step with a journal, over one without: ${journal.ratio.toFixed(2)}`)
  const machine = { date: new Date().toISOString(), cpu: cpus()[0]?.model, cores: cpus().length, node: process.version }
  const results = { machine, model: model.name, state_bytes: state, checkpoints, journal, restore, verdicts }
  const name = flags.quick ? 'durability-quick' : 'durability'
  await writeFile(new URL(`../../bench/results/${name}.json`, import.meta.url), `${JSON.stringify(results, null, 2)}\n`)
} finally {
  await rm(data, { recursive: true })
}

/** Times steps before, beside and after the writing of a checkpoint, so that a machine that changes its pace shows. */
async function measureCheckpoints(folder: string) {
  const service = await startService(['--data', folder, '--checkpoint-steps', '0'])
  const trainer = await startTrainer(service.url, model)
  for (let i = 0; i < STEPS; i++) await trainer.step()
  const rounds = []
  for (let round = 0; round < ROUNDS; round++) {
    resetPeak(service.pid)
    const without = await secondsOf(trainer, STEPS)
    const before = memory(service.pid).peak
    resetPeak(service.pid)
    const beside = await besideCheckpoint(service.url, trainer)
    const extra_bytes = memory(service.pid).peak - before
    without.push(...(await secondsOf(trainer, STEPS)))
    rounds.push({ without: median(without), ...beside, extra_bytes })
    const { steps, ratio, write_seconds } = { ...beside, ratio: beside.step_seconds / median(without) }
    console.log(
      `checkpoint written in ${write_seconds.toFixed(1)} s beside ${steps} steps, each ${ratio.toFixed(2)} of one without`,
    )
  }
  await trainer.close()
  await service.stop()
  return {
    rounds,
    ratio: median(rounds.map(({ step_seconds, without }) => step_seconds / without)),
    extra_bytes: Math.max(...rounds.map(({ extra_bytes }) => extra_bytes)),
  }
}

/** Times the steps that begin while a checkpoint is written, and the writing. */
async function besideCheckpoint(url: URL, trainer: Trainer) {
  const started = performance.now()
  let write_seconds = 0
  const written = fetch(new URL('/v1/runs/bench/checkpoints', url.href.replace('ws', 'http')), { method: 'POST' }).then(
    async (response) => {
      write_seconds = (performance.now() - started) / 1000
      if (response.status !== 201) throw new Error(await response.text())
    },
  )
  const seconds: number[] = []
  while (write_seconds === 0) seconds.push((await trainer.step()).seconds)
  await written
  return { steps: seconds.length, step_seconds: median(seconds), write_seconds }
}

/** Times steps of two services in turn, one of which keeps a journal. */
async function measureJournal() {
  const services = []
  for (const durability of ['checkpoint', 'journal']) {
    const service = await startService([
      '--data',
      join(data, durability),
      '--checkpoint-steps',
      '0',
      '--durability',
      durability,
    ])
    services.push({ service, trainer: await startTrainer(service.url, model) })
  }
  const pairs = []
  for (let i = 0; i <= ROUNDS; i++) {
    const [without, journal] = [await secondsOf(services[0].trainer, 1), await secondsOf(services[1].trainer, 1)]
    if (i > 0) pairs.push({ without: without[0], journal: journal[0] })
  }
  for (const { service, trainer } of services) {
    await trainer.close()
    await service.stop()
  }
  return { pairs, ratio: median(pairs.map(({ without, journal }) => journal / without)) }
}

/** Times restarts of a service, and in turn a sequential read of the same files. The page cache has none of them. */
async function measureRestore(folder: string) {
  const checkpoints = join(folder, 'runs', 'bench', 'checkpoints')
  const newest = join(checkpoints, (await readdir(checkpoints)).sort().at(-1) ?? '')
  const rounds = []
  for (let round = 0; round < ROUNDS; round++) {
    const cold = await dropCaches()
    const { bytes, seconds } = await readThrough(newest)
    await dropCaches()
    const restored = await restoreSeconds(folder)
    rounds.push({ cold, disk: bytes / 1e9 / seconds, restore: bytes / 1e9 / restored })
    console.log(
      `disk ${rounds[round].disk.toFixed(2)} GB/s, restore ${rounds[round].restore.toFixed(2)} GB/s${cold ? '' : ' (cached: no right to drop caches)'}`,
    )
  }
  return { rounds, ratio: median(rounds.map(({ disk, restore }) => restore / disk)) }
}

async function restoreSeconds(folder: string): Promise<number> {
  let tell: (seconds: number) => void = () => {}
  const restored = new Promise<number>((resolve) => {
    tell = resolve
  })
  const service = await startService(['--data', folder, '--checkpoint-steps', '0'], ({ event, seconds }) => {
    if (event === 'run_restored') tell(Number(seconds))
  })
  const seconds = await restored
  await service.stop()
  return seconds
}

async function dropCaches(): Promise<boolean> {
  try {
    await writeFile('/proc/sys/vm/drop_caches', '3')
    return true
  } catch {
    // Only root may drop the page cache. Without that the restart and the read both read from memory.
    return false
  }
}

async function readThrough(folder: string): Promise<{ bytes: number; seconds: number }> {
  const started = performance.now()
  const buffer = Buffer.allocUnsafe(4 << 20)
  let bytes = 0
  for (const name of await readdir(folder)) {
    const file = await open(join(folder, name))
    for (let count = 1; count > 0; bytes += count) count = (await file.read(buffer)).bytesRead
    await file.close()
  }
  return { bytes, seconds: (performance.now() - started) / 1000 }
}

async function secondsOf(trainer: Trainer, steps: number): Promise<number[]> {
  const seconds: number[] = []
  for (let i = 0; i < steps; i++) seconds.push((await trainer.step()).seconds)
  return seconds
}

function verdict(what: string, value: number, bound: number, side: 'at most' | 'at least') {
  const pass = side === 'at most' ? value <= bound : value >= bound
  console.log(`${what}: ${value.toFixed(2)}, ${side} ${bound.toFixed(2)}: ${pass ? 'pass' : 'FAIL'}`)
  return { what, value, bound, side, pass }
}

function mega(bytes: number): number {
  return Math.round(bytes / 1e6)
}
