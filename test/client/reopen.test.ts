import { cpSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { connect, type Run } from '../../src/client/client.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { gradientsOf, modelOf, weightsOf } from './model.js'
import { opened, receipt, say, startPeer } from './peer.js'
import { QUICK, type Service, startProxy, startService } from './service.js'
import { clientOf, fresh, STEPS, service, stepAll, train } from './trainer.js'

type Model = ReturnType<typeof modelOf>

async function trainOn(run: Run, { parameters }: Model, to: number): Promise<string> {
  while (run.step_count < to) await run.step(gradientsOf(parameters, run.step_count + 1))
  return run.digest
}

/** Puts weights back that `weightsOf` read. */
function restore({ parameters }: Model, bytes: readonly Buffer[]): void {
  parameters.forEach(({ data }, i) => {
    new Uint8Array(data.buffer, data.byteOffset, data.byteLength).set(bytes[i]!)
  })
}

type Tap = Parameters<typeof clientOf>[0]

/** A service of the test's own that keeps what a checkpoint was asked for, and with a journal every step. */
async function durable(t: Tap, data: string, durability = 'checkpoint'): Promise<Service> {
  const kept = await startService({ data, checkpoint_steps: 0, durability })
  t.teardown(() => kept.drain())
  return kept
}

t.test('settling ends a step whose gradients nobody has any more', async (t) => {
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 0.5 }]
  const open = () => {
    const parameters = [0, 1, 2].map((i) => ({ name: `p${i}`, shape: [2], group: 'all', data: new Float32Array(2) }))
    return { run: name, groups, parameters }
  }
  const [name, ones] = [fresh(), Float32Array.of(1, 1)]
  const crashed = await clientOf(t)
  await t.rejects((await crashed.open(open())).step([ones, Float32Array.of(NaN, 0), ones]), {
    code: 'GRADIENT_NOT_FINITE',
    fields: { refused: ['p1'] },
  })
  await crashed.close()
  const model = open()
  const run = await (await clientOf(t)).open(model)
  t.same(run.ahead, [0, 2])
  t.same(await run.settle(), ['p0', 'p2'])
  t.equal(run.step_count, 1)
  t.same(run.ahead, [])
  t.same(
    model.parameters.map(({ data }) => [...data]),
    [
      [0, 0],
      [0, 0],
      [0, 0],
    ],
    'the updates are lost',
  )
  t.match(await run.step([ones, ones, ones]), { step: 2, applied: 3 })
  t.same(await run.settle(), [], 'there is nothing to settle any more')
})

t.test('settling leaves a step in flight alone: its gradients are there', async (t) => {
  const [name, crashed] = [fresh(), await clientOf(t)]
  const model = modelOf(name)
  const gradients = gradientsOf(model.parameters, 1)
  const [, ...others] = gradients
  const bad = Float32Array.from(gradients[0]!).fill(NaN)
  await t.rejects((await crashed.open(modelOf(name))).step([bad, ...others]), { code: 'GRADIENT_NOT_FINITE' })
  await crashed.close()
  const run = await (await clientOf(t)).open(model)
  t.same(run.ahead, [1, 2, 3, 4])
  run.gradient(0, gradients[0]!)
  t.same(await run.settle(), [])
  for (let index = 1; index < gradients.length; index++) run.gradient(index, gradients[index]!)
  t.match(await run.end(), { step: 1, applied: 5 })
  const alone = await train(await clientOf(t), fresh(), stepAll)
  t.equal(await trainOn(run, model, STEPS), alone.digest)
})

t.test(
  'opening again gives up what was in flight; with the weights of its beginning the step is taken anew',
  async (t) => {
    const expected = await train(await clientOf(t), fresh())
    const model = modelOf(fresh())
    const run = await (await clientOf(t)).open(model)
    await trainOn(run, model, 1)
    const weights = weightsOf(model.parameters)
    const gradients = gradientsOf(model.parameters, 2)
    const closed = {
      code: 'CLIENT_CLOSED',
      message: /^reopen\(\) ended the connection of run 'run-\d+': until it resolves/,
    }
    const step = t.rejects(run.step(gradients), closed)
    const reopened = run.reopen()
    await t.rejects(run.reopen(), { code: 'STEP_CONFLICT', message: /^step 2 is where the run is being opened again/ })
    await step
    t.throws(() => run.begin(), {
      code: 'STEP_CONFLICT',
      message: /^step 2 cannot begin while the run is opened again/,
    })
    await t.rejects(run.checkpoint(), { code: 'STEP_CONFLICT' })
    await reopened
    t.equal(run.step_count, 1)
    restore(model, weights)
    run.gradient(0, gradients[0]!)
    await run.reopen()
    restore(model, weights)
    t.equal(await trainOn(run, model, STEPS), expected.digest)
    t.same(weightsOf(model.parameters), expected.weights)
  },
)

t.test('going back to a checkpoint drops what came after and has no tag, also while the service is away', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  const kept = await durable(t, t.testdir({}), 'journal')
  const proxy = await startProxy(kept.port)
  const { port } = new URL(proxy.url)
  let back: Promise<{ close: () => Promise<void> }> | undefined
  const random = () => {
    back ??= startProxy(kept.port, [], Number(port))
    return 0
  }
  const client = await clientOf(
    t,
    { backoff: { first_seconds: 0.001, most_seconds: 0.01, random }, retries: 1000 },
    proxy.url,
  )
  const model = modelOf(fresh())
  const run = await client.open(model)
  await trainOn(run, model, 1)
  await run.checkpoint({ tag: 'one' })
  const weights = weightsOf(model.parameters)
  await trainOn(run, model, 2)
  const { checkpoint: two } = await run.checkpoint()
  await trainOn(run, model, 3)
  await run.checkpoint({ tag: 'three' })
  const third = { digest: run.digest, weights: weightsOf(model.parameters) }
  await proxy.close()
  await run.reopen({ checkpoint: 'one' })
  t.teardown(async () => (await back)?.close())
  t.ok(back, 'it was tried again')
  t.equal(run.step_count, 1)
  t.equal(run.opened.step, 1)
  restore(model, weights)
  await t.rejects(run.reopen({ checkpoint: two }), { code: 'NOT_FOUND', message: /has no checkpoint 'step-0{11}2'/ })
  const refused = { code: 'CLIENT_CLOSED', message: /until it resolves, the run takes no step/ }
  await t.rejects(run.step(gradientsOf(model.parameters, 2)), refused, 'after a reopen that rejected')
  await run.reopen({ checkpoint: 'three' })
  t.same([run.step_count, run.digest], [3, third.digest])
  restore(model, third.weights)
  t.equal(await trainOn(run, model, STEPS), expected.digest)
  t.same(weightsOf(model.parameters), expected.weights)
})

t.test('a service behind this client names the step to return to, and reopen goes on from there', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  const folder = t.testdir({ data: {} })
  const [data, copy] = [join(folder, 'data'), join(folder, 'copy')]
  const proxy = await startProxy((await durable(t, data)).port)
  const { port } = new URL(proxy.url)
  const model = modelOf(fresh())
  const run = await (await clientOf(t, QUICK, proxy.url)).open(model)
  await trainOn(run, model, 2)
  const { digest } = await run.checkpoint()
  const weights = weightsOf(model.parameters)
  // What a service has that is killed now and started again.
  cpSync(data, copy, { recursive: true })
  await trainOn(run, model, 3)
  await proxy.close()
  const restarted = await startProxy((await durable(t, copy)).port, [], Number(port))
  t.teardown(() => restarted.close())
  const behind = {
    code: 'STEP_CONFLICT',
    message: /resumed at step 2, this client is at step 3: go back to your weights of step 2/,
  }
  // It stays so, whatever the run is asked for.
  await t.rejects(run.checkpoint(), behind)
  await t.rejects(run.step(gradientsOf(model.parameters, 4)), behind)
  restore(model, weights)
  await run.reopen()
  t.match({ step_count: run.step_count, digest: run.digest }, { step_count: 2, digest })
  t.equal(await trainOn(run, model, STEPS), expected.digest)
  t.same(weightsOf(model.parameters), expected.weights)
})

t.test('a service that forgot the run says so, with the step that it was at', async (t) => {
  const proxy = await startProxy(service.port)
  const { port } = new URL(proxy.url)
  const model = modelOf(fresh())
  const run = await (await clientOf(t, QUICK, proxy.url)).open(model)
  await trainOn(run, model, 2)
  await proxy.close()
  const forgetful = await startService()
  const restarted = await startProxy(forgetful.port, [], Number(port))
  const message = /it was at step 2 here: was the service restarted without durable state\?$/
  const gone = { code: 'RUN_NOT_FOUND', status: 404, retryable: false, message }
  await t.rejects(run.step(gradientsOf(model.parameters, 3)), gone)
  await t.rejects(run.reopen(), gone)
  await restarted.close()
  await forgetful.drain()
})

t.test('reopen ends the wait for another attempt', async (t) => {
  const proxy = await startProxy(service.port)
  t.teardown(() => proxy.close())
  const model = modelOf(fresh())
  let waits = () => {}
  const waiting = new Promise<void>((resolve) => {
    waits = resolve
  })
  const random = () => {
    waits()
    return 0
  }
  const backoff = { first_seconds: 600, most_seconds: 600, random }
  const run = await (await clientOf(t, { backoff }, proxy.url)).open(model)
  proxy.cut()
  const step = t.rejects(run.step(gradientsOf(model.parameters, 1)), { code: 'CLIENT_CLOSED' })
  await waiting
  await run.reopen()
  await step
  t.equal(run.step_count, 0)
})

t.test('a client that is closed opens nothing again', async (t) => {
  const client = await clientOf(t)
  const run = await client.open(modelOf(fresh()))
  await client.close()
  await t.rejects(run.reopen(), { code: 'CLIENT_CLOSED', message: 'the client was closed' })
})

t.test('a run that another client has taken is taken back by reopen only', async (t) => {
  const model = modelOf(fresh())
  const first = await (await clientOf(t)).open(model)
  const other = modelOf(model.run)
  const second = await (await clientOf(t)).open({ ...other, takeover: true })
  await trainOn(second, other, 2)
  await t.rejects(first.step(gradientsOf(model.parameters, 1)), { code: 'TAKEN_OVER' })
  await first.reopen()
  t.equal(first.step_count, 2)
  restore(model, weightsOf(other.parameters))
  t.match(await first.step(gradientsOf(model.parameters, 3)), { step: 3 })
  await t.rejects(second.step(gradientsOf(other.parameters, 3)), { code: 'TAKEN_OVER' })
})

t.test('going back names the checkpoint once', async (t) => {
  const opens: OpenFrame[] = []
  const peer = await startPeer((frame, socket, connection) => {
    if (frame.type === 'open') opens.push(frame)
    say(socket, frame.type === 'open' ? opened(connection === 0 ? 5 : 3) : receipt(4))
  })
  t.teardown(peer.close)
  const client = await connect(peer.url, QUICK)
  t.teardown(() => client.close())
  const parameters = [{ name: 'w', shape: [2], group: 'all', data: Float32Array.of(2, 4) }]
  const run = await client.open({ run: 'r', mode: 'resume', checkpoint: 'first', groups: [], parameters })
  t.equal(run.step_count, 5)
  await run.reopen({ checkpoint: 'third' })
  t.match({ step_count: run.step_count, digest: run.digest }, { step_count: 3, digest: 'digest of 3' })
  await run.reopen()
  t.match(await run.step([], { skipped: [0] }), { step: 4 })
  t.same(
    opens.map(({ checkpoint }) => checkpoint),
    ['first', 'third', undefined],
  )
  t.same(
    opens.map(({ takeover }) => takeover),
    [undefined, true, true],
  )
  t.same(
    opens.map(({ groups }) => groups),
    [[], undefined, undefined],
  )
})
