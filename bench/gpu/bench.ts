import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { CUDA_GROUP } from '../../src/device/backend.js'
import { openCuda } from '../../src/device/cuda/cuda.js'
import { Device } from '../../src/device/device.js'
import { prepare } from './jobs.js'
import { WORKLOADS, type Workload } from './models.js'

/**
 * Steps of Muon on one GPU against torch.optim.Muon on the same one: `npm run bench:gpu`. Gradients and updates are
 * bfloat16, state is float32. "resident" has gradients and updates on the GPU, as torch has; "copied" has them in
 * page-locked host memory, so that both cross PCIe. Flags: `--only NAME`, `--memory resident,copied`, `--lanes 4,6`,
 * `--groups 4,16` (the most jobs that a lane is given at once; else the service's own), `--device cuda:0,1` (torch has
 * GPU 0 alone), `--out FILE` for the results.
 */
const only = option('--only')
const deviceName = option('--device') ?? 'cuda'
const memories = (option('--memory') ?? 'resident,copied').split(',')
const out = option('--out') ?? 'bench/results/gpu.json'
const groups = (option('--groups') ?? String(CUDA_GROUP.jobs)).split(',').map(Number)
const laneCounts = (option('--lanes') ?? '1,2,3,4,6,8').split(',').map(Number)
const STEPS = 30
const MEMORIES = ['resident', 'copied'] as const
const WARM_UP_STEPS = 3

type Row = {
  workload: string
  memory: 'resident' | 'copied'
  lanes: number
  group_jobs: number
  milliseconds: number
  ratio: number
  device_MB: number
  event_loop_delay_ms: number
}

const gpu = openCuda(0)
const rows: Row[] = []
console.log(
  `${gpu.name}, ${availableParallelism()} cores, ${new Date().toISOString().slice(0, 10)}, Node ${process.version}`,
)
const workloads = WORKLOADS.filter(({ name }) => !only || name === only)
for (const workload of workloads) {
  const torch = timeTorch(workload.name)
  console.log(`${workload.name}: torch.optim.Muon ${torch.milliseconds} ms (PyTorch ${torch.version})`)
  for (const memory of MEMORIES.filter((name) => memories.includes(name))) {
    for (const [lanes, group_jobs] of laneCounts.flatMap((lanes) => groups.map((group) => [lanes, group]))) {
      const measured = await measure(workload, memory, { lanes, group_jobs })
      const row = {
        workload: workload.name,
        memory,
        lanes,
        group_jobs,
        ...measured,
        ratio: measured.milliseconds / torch.milliseconds,
      }
      rows.push(row)
      const { milliseconds, ratio, device_MB, event_loop_delay_ms } = row
      const figures = `${milliseconds.toFixed(2)} ms, ratio ${ratio.toFixed(2)}, ${device_MB} MB of device memory`
      console.log(
        `  ${memory} ${lanes} lanes of ${group_jobs} jobs: ${figures}, event loop delayed ${event_loop_delay_ms.toFixed(1)} ms at most`,
      )
    }
  }
}
const exactness = measureExactness()
mkdirSync(dirname(out), { recursive: true })
const header = {
  date: new Date().toISOString(),
  gpu: gpu.name,
  device: deviceName,
  cores: availableParallelism(),
  node: process.version,
}
writeFileSync(out, `${JSON.stringify({ ...header, rows, exactness }, null, 2)}\n`)

async function measure({ parameters }: Workload, memory: Row['memory'], how: { lanes: number; group_jobs: number }) {
  const before = gpu.memory().free
  const onnxruntime_dir = process.env.MUOND_ONNXRUNTIME_DIR ?? ''
  const device = await Device.start({
    ...{ device: deviceName, onnxruntime_dir, threads: 0, ...how },
    ...{ staging_bytes: 1 << 20, state_bytes_limit: 0 },
  })
  const { step, free } = await prepare(device, gpu, { parameters, resident: memory === 'resident' })
  const delay = monitorEventLoopDelay({ resolution: 1 })
  const times: number[] = []
  for (let i = 0; i < WARM_UP_STEPS + STEPS; i++) {
    if (i === WARM_UP_STEPS) delay.enable()
    const started = performance.now()
    await step()
    if (i >= WARM_UP_STEPS) times.push(performance.now() - started)
  }
  delay.disable()
  const device_MB = Math.round((before - gpu.memory().free) / 1e6)
  await device.close()
  free()
  times.sort((a, b) => a - b)
  return { milliseconds: times[STEPS / 2], device_MB, event_loop_delay_ms: delay.max / 1e6 }
}

function timeTorch(workload: string): { milliseconds: number; version: string } {
  return JSON.parse(call('python3', 'bench/gpu/torch_muon.py', workload))
}

/** Distances of one update to float64, ours and torch's (accuracy.py). */
function measureExactness(): Record<string, unknown>[] {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  call('python3', 'bench/gpu/accuracy.py', 'make', folder)
  call(process.execPath, join(import.meta.dirname, 'accuracy.js'), folder)
  const lines = call('python3', 'bench/gpu/accuracy.py', 'judge', folder).trim().split('\n')
  rmSync(folder, { recursive: true })
  for (const line of lines) console.log(line)
  return lines.map((line) => JSON.parse(line))
}

function call(program: string, ...parameters: string[]): string {
  const { stdout, stderr, status } = spawnSync(program, parameters, { encoding: 'utf8' })
  if (status !== 0) throw new Error(`${parameters[0]}: ${stderr}`)
  return stdout
}

function option(name: string): string | undefined {
  const at = process.argv.indexOf(name)
  return at < 0 ? undefined : process.argv[at + 1]
}
