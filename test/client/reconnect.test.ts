import t from 'tap'
import { gradientsOf, modelOf, randomFrom, weightsOf } from './model.js'
import { QUICK, startProxy, startService } from './service.js'
import { clientOf, fresh, STEPS, service, train, turn } from './trainer.js'

t.test('connections cut after any number of bytes change neither the weights nor the digest', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  let cuts = 0
  let replays = 0
  for (let seed = 0; seed < 8; seed++) {
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
  t.ok(cuts >= 40, `${cuts} connections were cut`)
  t.ok(replays > 0, `${replays} receipts were lost and came again`)
})

t.test('a connection lost between steps is replaced at the next', async (t) => {
  const proxy = await startProxy(service.port)
  t.teardown(() => proxy.close())
  const client = await clientOf(t, QUICK, proxy.url)
  const expected = await train(await clientOf(t), fresh())
  const { weights, digest, run } = await train(client, fresh(), async (run, gradients) => {
    const receipt = await run.step(gradients)
    proxy.cut()
    return receipt
  })
  t.same(weights, expected.weights)
  t.equal(digest, expected.digest)
  t.equal(run.opened.epoch, STEPS, 'an epoch for every connection that took a step')
})

t.test('a connection lost while gradients come one by one is replaced, and all of them are sent again', async (t) => {
  const proxy = await startProxy(service.port)
  t.teardown(() => proxy.close())
  const client = await clientOf(t, QUICK, proxy.url)
  const expected = await train(await clientOf(t), fresh())
  const { digest } = await train(client, fresh(), async (run, gradients) => {
    for (const { index } of run.parameters) {
      run.gradient(index, gradients[index])
      if (index === 2) proxy.cut()
      await turn()
    }
    return run.end()
  })
  t.equal(digest, expected.digest)
})

t.test(
  'a service that stays away is given up after so many retries, and the run goes on when it is back',
  async (t) => {
    const proxy = await startProxy(service.port)
    const client = await clientOf(t, { ...QUICK, retries: 2 }, proxy.url)
    const model = modelOf(fresh())
    const run = await client.open(model)
    const { port } = new URL(proxy.url)
    await proxy.close()
    await t.rejects(run.step(gradientsOf(model.parameters, 1)), {
      code: 'CONNECTION_LOST',
      retryable: true,
      message: /ECONNREFUSED/,
    })
    const again = await startProxy(service.port, [], Number(port))
    t.teardown(() => again.close())
    t.match(await run.step(gradientsOf(model.parameters, 1)), { step: 1, replayed: false })
  },
)

t.test('a run taken over by another client is not taken back', async (t) => {
  const client = await clientOf(t)
  const name = fresh()
  const model = modelOf(name)
  const first = await client.open(model)
  await t.rejects(client.open(model), { code: 'RUN_BUSY', status: 409 })
  const second = await client.open({ ...model, mode: 'resume', takeover: true })
  for (let attempt = 0; attempt < 2; attempt++) {
    await t.rejects(first.step(gradientsOf(model.parameters, 1)), { code: 'TAKEN_OVER', retryable: false })
  }
  t.match(await second.step(gradientsOf(model.parameters, 1)), { step: 1 })
  t.equal(second.opened.epoch, 2)
})

t.test('a run that is not where the client left it is refused, with the step to go back to', async (t) => {
  const table: [title: string, steps: number, message: RegExp][] = [
    ['behind', 1, /resumed at step 1, this client is at step 2: go back to your weights of step 1/],
    ['another history', 2, /has digest [0-9a-f]+ at step 2, this client has/],
    ['ahead', 4, /resumed at step 4, this client is at step 2/],
  ]
  for (const [title, steps, message] of table) {
    const name = fresh()
    const model = modelOf(name)
    const run = await (await clientOf(t)).open(model)
    for (let step = 1; step <= 2; step++) await run.step(gradientsOf(model.parameters, step))
    await service.runs.delete(name)
    const other = modelOf(name)
    const intruder = await clientOf(t)
    const theirs = await intruder.open(other)
    for (let step = 1; step <= steps; step++) await theirs.step(gradientsOf(other.parameters, 100 + step))
    await intruder.close()
    const before = weightsOf(model.parameters)
    const refused = { code: 'STEP_CONFLICT', message, fields: { step: 3, expected_step: steps + 1 } }
    await t.rejects(run.step(gradientsOf(model.parameters, 3)), refused, title)
    t.same(weightsOf(model.parameters), before, title)
  }
})

t.test('a deleted run is gone', async (t) => {
  const name = fresh()
  const model = modelOf(name)
  const run = await (await clientOf(t)).open(model)
  await service.runs.delete(name)
  await t.rejects(run.step(gradientsOf(model.parameters, 1)), { code: 'RUN_NOT_FOUND', status: 404 })
})

t.test('a service that drains ends the step in flight and refuses the next', async (t) => {
  const draining = await startService()
  const client = await clientOf(t, { ...QUICK, retries: 1 }, draining.url)
  const model = modelOf('last')
  const run = await client.open(model)
  await run.step(gradientsOf(model.parameters, 1))
  run.gradient(0, gradientsOf(model.parameters, 2)[0])
  const drained = draining.drain()
  for (const { index } of run.parameters.slice(1)) run.gradient(index, gradientsOf(model.parameters, 2)[index])
  await run.end().catch(({ code }) => t.match(code, /DRAINING|CONNECTION_LOST/))
  await drained
  await t.rejects(run.step(gradientsOf(model.parameters, run.step_count + 1)), { code: 'CONNECTION_LOST' })
})
