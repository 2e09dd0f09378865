import t, { type Test } from 'tap'
import { type Client, type ConnectOptions, connect, type Run } from '../../src/client/client.js'
import { gradientsOf, modelOf, weightsOf } from './model.js'
import { QUICK, startService } from './service.js'

export const STEPS = 4

/** The service of one test file. */
export const service = await startService()
t.teardown(() => service.drain())

/** A client that is closed with its test. */
export async function clientOf(t: Test, options: ConnectOptions = QUICK, url = service.url): Promise<Client> {
  const client = await connect(url, options)
  t.teardown(() => client.close())
  return client
}

export type TakeStep = (run: Run, gradients: ReturnType<typeof gradientsOf>) => ReturnType<Run['step']>

export const stepAll: TakeStep = (run, gradients) => run.step(gradients)

/** The weights and the digest after `STEPS` undisturbed steps. */
export async function train(client: Client, name: string, takeStep = stepAll) {
  const model = modelOf(name)
  const run = await client.open(model)
  for (let step = 1; step <= STEPS; step++) await takeStep(run, gradientsOf(model.parameters, step))
  return { weights: weightsOf(model.parameters), digest: run.digest, run }
}

let count = 0
/** A name that no run has yet. */
export const fresh = () => `run-${count++}`

/** Waits a turn of the event loop, in which sockets are read and written. */
export const turn = () => new Promise((resolve) => setImmediate(resolve))
