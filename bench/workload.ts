import { connectEcho } from './echo-client.js'
import { gradientBytes, type Model, muonMatrices, stateBytes } from './models.js'
import { cpuSeconds, type Memory, memory, startProgram, startService } from './process.js'
import { startTrainer } from './trainer.js'

/** A program that the service is measured against, in turn with it. */
export type ReferenceName = 'plain Newton-Schulz' | 'TCP echo'

export type Workload = { model: Model; reference: ReferenceName; steps: number }

/** Seconds by the clock and CPU seconds of the serving process alone. */
export type Cost = { seconds: number; cpu_seconds: number }

export type Measurement = {
  workload: string
  reference: ReferenceName
  gradient_bytes: number
  state_bytes: number
  /** In each pair first a step of the service, then the reference's share of work. */
  pairs: { service: Cost; reference: Cost; phases: Record<string, number> }[]
  memory: Memory
}

/**
 * Measures a workload with a service of its own. The first step, which builds sessions and touches memory, is left
 * out.
 */
export async function measureWorkload(
  { model, reference, steps }: Workload,
  flags: readonly string[] = [],
): Promise<Measurement> {
  const service = await startService(flags)
  const other = await references[reference](model)
  const trainer = await startTrainer(service.url, model)
  await trainer.step()
  await other.run()
  const pairs: Measurement['pairs'] = []
  for (let i = 0; i < steps; i++) {
    let phases = {}
    const cost = await costOf(service.pid, async () => {
      phases = (await trainer.step()).receipt.seconds
    })
    pairs.push({ service: cost, reference: await costOf(other.pid, other.run), phases })
  }
  const resident = memory(service.pid)
  await trainer.close()
  await Promise.all([other.stop(), service.stop()])
  const sizes = { gradient_bytes: gradientBytes(model), state_bytes: stateBytes(model) }
  return { workload: model.name, reference, ...sizes, pairs, memory: resident }
}

type Reference = { pid: number; run: () => Promise<unknown>; stop: () => Promise<void> }

const references: Record<ReferenceName, (model: Model) => Promise<Reference>> = {
  'plain Newton-Schulz': async (model) => {
    const { pid, answer, ask, stop } = await startProgram('plain', [JSON.stringify(muonMatrices(model))])
    await answer()
    return { pid, run: () => ask('step'), stop }
  },
  'TCP echo': async (model) => {
    const { pid, answer, stop } = await startProgram('echo')
    const echo = await connectEcho(Object(await answer()).port)
    const end = async () => {
      echo.close()
      await stop()
    }
    return { pid, run: () => echo.run(gradientBytes(model)), stop: end }
  },
}

async function costOf(pid: number, work: () => Promise<unknown>): Promise<Cost> {
  const started = performance.now()
  const before = cpuSeconds(pid)
  await work()
  return { seconds: (performance.now() - started) / 1000, cpu_seconds: cpuSeconds(pid) - before }
}
