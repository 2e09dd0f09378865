import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { availableParallelism, cpus, loadavg } from 'node:os'
import { parseArgs } from 'node:util'
import type { Efficiency } from './efficiency.js'
import { GPT2, SMALL, transformer } from './models.js'
import { startProgram } from './process.js'
import { render, summarize, summarizeEfficiency, verdicts } from './report.js'
import { measureWorkload, type Workload } from './workload.js'

/**
 * `npm run bench`: measures the service on this machine's CPU, prints ratios and writes bench/results/cpu.json.
 * `--quick` is a short run.
 */
const { values: flags } = parseArgs({
  options: {
    quick: { type: 'boolean', default: false },
    only: { type: 'string', default: '' },
    service: { type: 'string', multiple: true, default: [] },
  },
})

const muon = { hidden: 'muon', rest: 'adamw' } as const
const sgd = { hidden: 'sgd', rest: 'sgd' } as const
const workloads: Workload[] = [
  { model: transformer(SMALL, muon), reference: 'plain Newton-Schulz', steps: 20 },
  { model: transformer(SMALL, sgd), reference: 'TCP echo', steps: 20 },
  { model: transformer(GPT2, { ...sgd, dtype: 'bfloat16' }), reference: 'TCP echo', steps: 5 },
  { model: transformer(GPT2, sgd), reference: 'TCP echo', steps: 5 },
  { model: transformer(GPT2, muon), reference: 'plain Newton-Schulz', steps: 2 },
]
const cores = availableParallelism()
const kernels = (flags.quick ? [1] : [...new Set([1, cores])]).map((threads) => [flags.quick ? 1024 : 2048, threads, 5])

const machine = await describeMachine()
console.log(
  Object.entries(machine)
    .map(([name, value]) => `${name}: ${value}`)
    .join('\n'),
)

const measured = []
for (const workload of workloads.filter(({ model }) => model.name.includes(flags.only))) {
  if (flags.quick && workload.steps < 20) continue
  console.error(`measuring ${workload.model.name} against ${workload.reference} …`)
  measured.push(await measureWorkload(workload, flags.service))
}
const efficiencies = []
for (const args of kernels) {
  console.error(`measuring Newton-Schulz on ${args[0]} x ${args[0]}, ${args[1]} thread(s) …`)
  efficiencies.push(await measureKernel(args))
}

const summaries = measured.map(summarize)
const kernelSummaries = efficiencies.map(summarizeEfficiency)
console.log(`\n${render(summaries, kernelSummaries)}`)
const file = new URL(`../../bench/results/${flags.quick ? 'cpu-quick' : 'cpu'}.json`, import.meta.url)
const results = {
  machine,
  workloads: summaries,
  newton_schulz: kernelSummaries,
  verdicts: verdicts(summaries, kernelSummaries),
  measured,
  efficiencies,
}
await mkdir(new URL('.', file), { recursive: true })
await writeFile(file, `${JSON.stringify(results, null, 2)}\n`)

async function measureKernel(args: readonly number[]): Promise<Efficiency> {
  const { answer, stop } = await startProgram('newton-schulz', args.map(String))
  const efficiency = (await answer()) as Efficiency
  await stop()
  return efficiency
}

async function describeMachine() {
  const require = createRequire(import.meta.url)
  const congestion = await readFile('/proc/sys/net/ipv4/tcp_congestion_control', 'utf8')
  return {
    date: new Date().toISOString(),
    cpu: cpus()[0].model,
    cores,
    load_before: loadavg()[0],
    node: process.version,
    onnxruntime: String(require('onnxruntime-node/package.json').version),
    tcp_congestion_control: congestion.trim(),
    service_flags: flags.service.join(' ') || '(defaults)',
  }
}
