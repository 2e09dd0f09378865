import { pathToFileURL } from 'node:url'
import { type Client, connect, MuondError, type Run } from '../../src/client/client.js'

/** A trainer for `muond conformance --quadratic`: with the loss |W|²/2 every gradient is the weights. */

const STEPS = 14

/** Trains until the run is lost, or for `STEPS` steps. */
export async function train(url: string): Promise<number> {
  const client = await connect(url, { backoff: { first_seconds: 0.001, most_seconds: 0.01 } })
  try {
    return await steps(client)
  } finally {
    await client.close()
  }
}

async function steps(client: Client): Promise<number> {
  const weights = {
    wide: Float32Array.from({ length: 96 }, (_, i) => Math.sin(i)),
    tall: Float32Array.from({ length: 120 }, (_, i) => Math.cos(i)),
    bias: Float32Array.of(1, -2, 3),
  }
  const run = await client.open({
    run: 'quadratic',
    groups: [
      { name: 'muon', algorithm: 'muon', lr: 0.02 },
      { name: 'adamw', algorithm: 'adamw', lr: 0.01, weight_decay: 0.1 },
    ],
    parameters: [
      { name: 'wide', shape: [8, 12], group: 'muon', data: weights.wide },
      { name: 'tall', shape: [20, 6], group: 'muon', data: weights.tall },
      { name: 'bias', shape: [3], group: 'adamw', data: weights.bias },
    ],
  })
  for (let step = 1; step <= STEPS; step++) {
    const end = await take(run, weights, step).catch((error: unknown) => error)
    if (end instanceof MuondError && end.code === 'RUN_NOT_FOUND') return step
    /* c8 ignore next -- a client that fails its conformance */
    if (end instanceof Error) throw end
  }
  return STEPS
}

/** Takes a step, again where a gradient was refused. */
async function take(run: Run, weights: Record<string, Float32Array>, step: number): Promise<void> {
  const gradients = Object.fromEntries(Object.entries(weights).map(([name, values]) => [name, values.slice()]))
  const options = { groups: { adamw: { lr: 0.01 / step } } }
  try {
    await run.step(gradients, options)
  } catch (error) {
    if (!(error instanceof MuondError) || error.code !== 'GRADIENT_NOT_FINITE') throw error
    await run.step(gradients, options)
  }
}

/* c8 ignore next -- a program only where it is started as one */
if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) await train(process.env.MUOND_URL!)
