import t from 'tap'
import { type Client, type ConnectOptions, connect } from '../../src/client/client.js'
import { gradientsOf, modelOf, weightsOf } from './model.js'
import { startService } from './service.js'
import { clientOf, fresh, STEPS, service, stepAll, type TakeStep, train, turn } from './trainer.js'

t.test('a run gives the same weights and digest however its gradients are handed over', async (t) => {
  const client = await clientOf(t)
  const small = await clientOf(t, { chunk_bytes: 37 })
  const expected = await train(client, fresh())
  const ways: [title: string, client: Client, takeStep: TakeStep][] = [
    [
      'by name',
      client,
      (run, gradients) => run.step(Object.fromEntries(run.parameters.map(({ name }, i) => [name, gradients[i]]))),
    ],
    [
      'one by one, last first',
      client,
      (run, gradients) => {
        for (const { index } of [...run.parameters].reverse()) run.gradient(index, gradients[index])
        return run.end()
      },
    ],
    [
      'one by one, with pauses',
      client,
      async (run, gradients) => {
        run.begin({ gradient_scale: 1 })
        for (const { name, index } of run.parameters) {
          await turn()
          run.gradient(name, gradients[index])
        }
        return run.end({ skipped: [] })
      },
    ],
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

t.test('a step may skip parameters, by name or index', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const before = weightsOf(model.parameters)
  const [wide, , half] = gradientsOf(model.parameters, 1)
  const receipt = await run.step([wide, undefined, half], { skipped: ['tall', 3, 'head'] })
  t.match(receipt, { step: 1, applied: 2, skipped: 3 })
  const changed = weightsOf(model.parameters).map((bytes, i) => !bytes.equals(before[i]))
  t.same(changed, [true, false, true, false, false])
})

t.test(
  'a refused gradient rejects with its name; the rest is applied, once, and the step can be taken again',
  async (t) => {
    const client = await clientOf(t)
    const model = modelOf(fresh())
    const run = await client.open(model)
    const gradients = gradientsOf(model.parameters, 1)
    const broken = gradients.map((gradient, i) =>
      i === 0 || i === 3 ? Float32Array.from(gradient).fill(NaN) : gradient,
    )
    const refused = { code: 'GRADIENT_NOT_FINITE', status: 422, fields: { step: 1, refused: ['wide', 'norm'] } }
    await t.rejects(run.step(broken), refused)
    const between = weightsOf(model.parameters)
    await t.rejects(run.step(broken), refused, 'a second time')
    t.same(weightsOf(model.parameters), between, 'nothing is applied twice')
    const receipt = await run.step(
      gradients.map((gradient, i) => (i === 0 || i === 3 ? undefined : gradient)),
      { skipped: ['wide', 'norm'] },
    )
    t.match(receipt, { step: 1, applied: 3, skipped: 2 })
    t.same(weightsOf(model.parameters), between)

    const clean = modelOf(fresh())
    const other = await client.open(clean)
    await other.step(
      gradientsOf(clean.parameters, 1).map((gradient, i) => (i === 0 || i === 3 ? undefined : gradient)),
      { skipped: [0, 3] },
    )
    t.same(weightsOf(clean.parameters), between)
    t.equal(other.digest, run.digest)
  },
)

t.test('a refused gradient that came one by one is heard of at the end', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const gradients = gradientsOf(model.parameters, 1)
  run.gradient('wide', Float32Array.from(gradients[0]).fill(Infinity))
  for (let index = 1; index < gradients.length; index++) {
    await turn()
    run.gradient(index, gradients[index])
  }
  await t.rejects(run.end(), { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['wide'], parameter: 0 } })
  t.match(await run.step(gradients), { step: 1, applied: 5 })
})

t.test('what the trainer got wrong is refused before anything is sent', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const gradients = gradientsOf(model.parameters, 1)
  const [wide, tall] = gradients
  const named = Object.fromEntries(run.parameters.map(({ name }, i) => [name, gradients[i]]))
  const table: [title: string, take: () => unknown, code: string, message: RegExp][] = [
    ['unknown name', () => run.step({ ...named, wyde: wide }), 'PARAMETER_UNKNOWN', /no parameter "wyde"/],
    ['unknown index', () => run.step([...gradients, wide]), 'PARAMETER_UNKNOWN', /no parameter 5/],
    ['unknown in skipped', () => run.step(gradients, { skipped: [9] }), 'PARAMETER_UNKNOWN', /no parameter 9/],
    [
      'wrong size',
      () => run.step([new Float32Array(3)]),
      'SHAPE_MISMATCH',
      /'wide' has 960 elements, its gradient has 3/,
    ],
    [
      'wrong type',
      () => run.step([tall]),
      'DTYPE_UNSUPPORTED',
      /'wide' has gradient_dtype float32, the gradient is a Uint16Array/,
    ],
    ['missing', () => run.step([wide]), 'STEP_INCOMPLETE', /for 'tall', 'half', 'norm', 'head'/],
    [
      'both',
      () => run.step(gradients, { skipped: ['head'] }),
      'STEP_CONFLICT',
      /both a gradient and a place in skipped for 'head'/,
    ],
  ]
  for (const [title, take, code, message] of table) await t.rejects(async () => take(), { code, message }, title)
  run.gradient(0, wide)
  t.throws(() => run.gradient(0, wide), { code: 'STEP_CONFLICT', message: /has a gradient of 'wide' already/ })
  t.throws(() => run.begin(), { code: 'STEP_CONFLICT', message: /still in flight/ })
  await t.rejects(run.step(gradients), { code: 'STEP_CONFLICT', message: /still in flight/ })
  const ending = run.end({ skipped: [1, 2, 3, 4] })
  t.throws(() => run.gradient(1, tall), { code: 'STEP_CONFLICT', message: /has ended/ })
  t.match(await ending, { step: 1, applied: 1 })
  t.match(await run.end({ skipped: [0, 1, 2, 3, 4] }), { step: 2, applied: 0 })
})

t.test('a step that the service refuses as a whole rejects, and can be taken again', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const gradients = gradientsOf(model.parameters, 1)
  await t.rejects(run.step(gradients, { groups: { hidden: { lr: -1 } } }), { code: 'HYPERPARAMETER_INVALID' })
  t.match(await run.step(gradients), { step: 1, applied: 5 })
})

t.test('hyperparameters of a step hold from that step on', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const rates: unknown[] = []
  for (const options of [{}, { groups: { hidden: { lr: 0.5 } }, gradient_scale: 0.25 }, {}]) {
    const receipt = await run.step(gradientsOf(model.parameters, 1), options)
    rates.push(receipt.groups.hidden.lr)
  }
  t.same(rates, [0.02, 0.5, 0.5])
})

t.test('receipts come to every reader until the client is closed', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  const run = await client.open(model)
  const receipts = run.receipts()
  for (let step = 1; step <= 2; step++) await run.step(gradientsOf(model.parameters, step))
  await client.close()
  const steps: number[] = []
  for await (const { step } of receipts) steps.push(step)
  t.same(steps, [1, 2])
})

t.test('a gradient larger than the send buffer waits for the socket', async (t) => {
  const client = await clientOf(t)
  const data = new Float32Array(5_000_000)
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 1 }]
  const run = await client.open({
    run: fresh(),
    groups,
    parameters: [{ name: 'w', shape: [data.length], group: 'all', data }],
  })
  await run.step([new Float32Array(data.length).fill(0.5)])
  t.ok(data.every((value) => value === -0.5))
})

t.test('an open that does not fit is refused', async (t) => {
  const client = await clientOf(t)
  const model = modelOf(fresh())
  await client.open(model)
  const [wide] = model.parameters
  const table: [title: string, options: Parameters<Client['open']>[0], code: string][] = [
    ['a run that exists', { ...model, mode: 'create' }, 'RUN_EXISTS'],
    ['a run that does not', { ...model, run: fresh(), mode: 'resume' }, 'RUN_NOT_FOUND'],
    ['other parameters', { ...model, takeover: true, parameters: [wide] }, 'RUN_MISMATCH'],
    ['data of another size', { ...model, parameters: [{ ...wide, data: new Float32Array(1) }] }, 'SHAPE_MISMATCH'],
    [
      'an unknown algorithm',
      { ...model, run: fresh(), groups: [{ name: 'hidden', algorithm: 'lion' }] },
      'HYPERPARAMETER_INVALID',
    ],
  ]
  for (const [title, options, code] of table) await t.rejects(client.open(options), { code }, title)
})

t.test('closing and aborting end what is in flight', async (t) => {
  const stop = new AbortController()
  const table: [title: string, client: Client, end: (client: Client) => unknown, message: RegExp][] = [
    ['close', await connect(service.url), (client) => client.close(), /^the client was closed$/],
    ['abort', await connect(service.url, { signal: stop.signal }), () => stop.abort(new Error('enough')), /^enough$/],
  ]
  for (const [title, client, end, message] of table) {
    const model = modelOf(fresh())
    const run = await client.open(model)
    const step = run.step(gradientsOf(model.parameters, 1))
    end(client)
    await t.rejects(step, { message }, title)
    await t.rejects(run.step(gradientsOf(model.parameters, 1)), { message }, `${title}, and then a step`)
    await t.rejects(client.open(modelOf(fresh())), { message }, `${title}, and then an open`)
    await client.close()
  }
  await t.rejects(connect(service.url, { signal: stop.signal }), { message: 'enough' }, 'an aborted signal')
})

t.test('a connection that cannot be made says why at once', async (t) => {
  const guarded = await startService({ api_keys: 'right-key-of-some-length' })
  t.teardown(() => guarded.drain())
  const away = await startService()
  await away.drain()
  const table: [title: string, url: string, options: ConnectOptions, name: string, message: RegExp][] = [
    ['no token', guarded.url, {}, 'MuondError', /key/],
    ['a wrong token', guarded.url, { token: 'wrong' }, 'MuondError', /key/],
    ['nobody there', away.url, {}, 'MuondError', /ECONNREFUSED/],
    ['another path', `${service.url}/nowhere`, {}, 'MuondError', /nowhere/],
    ['chunks of nothing', service.url, { chunk_bytes: 0 }, 'RangeError', /chunk_bytes is 0/],
  ]
  for (const [title, url, options, name, message] of table)
    await t.rejects(connect(url, options), { name, message }, title)
  await t.rejects(connect(guarded.url), { code: 'UNAUTHORIZED', status: 401, retryable: false })
  const client = await clientOf(t, { token: 'right-key-of-some-length' }, guarded.url.replace('ws:', 'http:'))
  t.match(await client.open(modelOf(fresh())), { step_count: 0 })
  process.env.MUOND_TOKEN = 'right-key-of-some-length'
  t.teardown(() => delete process.env.MUOND_TOKEN)
  await (await clientOf(t, {}, guarded.url)).close()
})
