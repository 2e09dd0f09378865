import t, { type Test } from "tap"
import { type Client, connect, type ConnectOptions, MuondError, type Run } from '../../src/client/client.js'
import { gradientsOf, modelOf, randomFrom, weightsOf } from './model.js'
import { startProxy, startService } from './service.js'

const QUICK: ConnectOptions = { backoff: { first_seconds: 0.001, most_seconds: 0.01 } }
const STEPS = 4

const service = await startService()
t.teardown(() => service.drain())

/** A client that is closed with its test. */
async function clientOf(t: Test, options: ConnectOptions = QUICK, url = service.url): Promise<Client> {
  const client = await connect(url, options)
  t.teardown(() => client.close())
  return client
}

/** Where `STEPS` undisturbed steps lead. */
async function train(client: Client, name: string, takeStep = stepAll) {
  const model = modelOf(name)
  const run = await client.open(model)
  for (let step = 1; step <= STEPS; step++) await takeStep(run, gradientsOf(model.parameters, step))
  return { weights: weightsOf(model.parameters), digest: run.digest, run }
}

type Gradients = ReturnType<typeof gradientsOf>
const stepAll = (run: Run, gradients: Gradients) => run.step(gradients)

let count = 0
const fresh = () => `run-${count++}`

t.test('a run gives the same weights and digest however its gradients are handed over', async (t) => {
  const client = await clientOf(t)
  const small = await clientOf(t, { chunk_bytes: 37 })
  const expected = await train(client, fresh())
  const ways: [title: string, client: Client, takeStep: typeof stepAll][] = [
    ['by name', client, (run, gradients) => run.step(Object.fromEntries(run.parameters.map(({ name }, i) => [name, gradients[i]])))],
    ['one by one, last first', client, (run, gradients) => {
      for (const { index } of [...run.parameters].reverse()) run.gradient(index, gradients[index])
      return run.end()
    }],
    ['one by one, with pauses', client, async (run, gradients) => {
      run.begin({ gradient_scale: 1 })
      for (const { name, index } of run.parameters) {
        await new Promise((resolve) => setImmediate(resolve))
        run.gradient(name, gradients[index])
      }
      return run.end({ skipped: [] })
    }],
    ['in chunks that cut elements', small, stepAll],
  ]
  for (const [title, by, takeStep] of ways) {
    const { weights, digest } = await train(by, fresh(), takeStep)
    t.same(weights, expected.weights, title)
    t.equal(digest, expected.digest, title)
  }
  t.equal(expected.run.step_count, STEPS)
  t.equal(expected.run.opened.step, 0)
})

t.test('connections cut after any number of bytes change neither the weights nor the digest', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  let cuts = 0
  let replays = 0
  for (let seed = 0; seed < 12; seed++) {
    const random = randomFrom(seed)
    // Upgrade and open take about 4500 bytes, a step 17,000 and more.
    const budgets = Array.from({ length: 12 }, () => Math.floor(4_500 + 10_000 * (1 + random())))
    const proxy = await startProxy(service.port, [12_000, ...budgets])
    t.teardown(() => proxy.close())
    const chunk_bytes = 300 + Math.floor(200 * random())
    const client = await clientOf(t, { ...QUICK, retries: 20, chunk_bytes }, proxy.url)
    const { weights, digest } = await train(client, fresh(), async (run, gradients) => {
      const receipt = await run.step(gradients)
      replays += Number(receipt.replayed)
      return receipt
    })
    t.same(weights, expected.weights, `seed ${seed}`)
    t.equal(digest, expected.digest, `seed ${seed}`)
    cuts += proxy.connections() - 1
  }
  t.ok(cuts >= 60, `${cuts} connections were cut`)
  t.ok(replays > 0, `${replays} receipts were lost and came again`)
})
