import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { connect } from '../../src/client/client.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { gradientsOf, known, MODEL, type Trace, train, undisturbed } from '../run/trainer.js'
import { RawClient, type Service, startService, until } from '../service.js'
import { flip, id, manifestOf, reseal, start as startIn, stateFile } from './data-folder.js'

const LAST = 8
let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})

async function start(t: Test, data: string, settings: Parameters<typeof startIn>[1] = {}): Promise<Service> {
  const service = await startIn(data, settings)
  t.teardown(() => service.app.close())
  await service.restored
  return service
}

/** Opens a run that begins at a checkpoint of run `r`. */
const branched = (service: Service, run: string, checkpoint: string, open: Partial<OpenFrame> = {}) =>
  train(service, { run, last: LAST, open: { mode: 'create', from: { run: 'r', checkpoint }, ...open } })

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(`${durability}: a run branches from one that trains, is idle, or waits on the disk`, async (t) => {
    const data = t.testdir({})
    const service = await start(t, data, { durability })
    const { client } = await train(service, { last: 7 })
    // The one that it branches from is in the middle of a step.
    client.gradient(0, 8, { values: gradientsOf(8)[0]! })
    await until(() => service.runs.get('r').begun)
    const first = await branched(service, 'first', id(5))
    const opened = { step: 5, digest: reference[4]!.digest, epoch: 1, resumed: false, ahead: [] }
    t.match(first.opened, { ...opened, note: `branched from ${id(5)} of run 'r'` })
    t.same(known(first.traces), known(reference.slice(5)))
    await first.client.close()
    client.send({ type: 'end', step: 8, skipped: [1, 2, 3, 4, 5, 6] })
    t.match(await client.expect('receipt'), { step: 8 }, 'the other run goes on')
    await client.close()
    await until(() => !service.runs.get('r').connected)
    await service.runs.restIdle(performance.now() + 86_400_000)
    const second = await branched(service, 'second', id(5))
    t.equal(service.runs.idle.has('r'), true, 'nobody needs it in memory')
    t.same(known(second.traces), known(reference.slice(5)))
    await second.client.close()
    await service.app.close()
    const again = await start(t, data, { durability, max_runs: 1 })
    const third = await branched(again, 'third', id(5))
    t.match(third.opened, opened)
    t.same(known(third.traces), known(reference.slice(5)))
    await third.client.close()
    const back = await train(again, { run: 'second', last: LAST, open: { mode: 'resume' } })
    t.match(back.opened, { step: durability === 'journal' ? 8 : 5 })
    await back.client.close()
    const resumed = await train(again, { run: 'third', last: LAST, open: { mode: 'resume', checkpoint: id(5) } })
    t.match(resumed.opened, { step: 5, digest: reference[4]!.digest })
    await resumed.client.close()
  })
}

t.test('a branch has the hyperparameters of its own declaration, also after a restart', async (t) => {
  const data = t.testdir({})
  const service = await start(t, data)
  await (await train(service, { last: 5 })).client.close()
  const groups = MODEL.groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 0.5 } : group))
  const client = await RawClient.connect(service.url)
  const from = { run: 'r', checkpoint: id(5) }
  t.match(await client.open({ run: 'b', mode: 'create', from, groups }), { step: 5, groups: { sgd: { lr: 0.5 } } })
  await client.close()
  t.match(service.runs.get('r').opened(true).groups, { sgd: { lr: 0.001 } })
  const bare = await RawClient.connect(service.url)
  t.match(
    await bare.open({ run: 'c', from }),
    { step: 5, groups: { sgd: { lr: 0.001 } } },
    'what is not given is as it was',
  )
  await bare.close()
  await service.app.close()
  const again = await start(t, data)
  t.match(again.runs.get('b').opened(true), { step: 5, groups: { sgd: { lr: 0.5 } }, note: undefined })
})

t.test('a branch that cannot be made leaves neither a run nor memory, and says why', async (t) => {
  const data = t.testdir({})
  const service = await start(t, data)
  await (await train(service, { last: 5 })).client.close()
  await service.runs.keeper('r').take('best')
  const admitted = service.device.admittedBytes
  const memory = service.device.memory.bytes
  const client = await RawClient.connect(service.url)
  const refused = async (open: Partial<OpenFrame>, error: object) => {
    client.send({ type: 'open', protocol: 1, run: 'b', from: { run: 'r', checkpoint: 'best' }, ...MODEL, ...open })
    t.match(await client.expect('error'), error)
    t.same(readdirSync(join(data, 'runs')), ['r'])
    t.same([service.device.admittedBytes, service.device.memory.bytes], [admitted, memory])
  }
  const groups = MODEL.groups.map((group) =>
    group.name === 'adamw' ? { ...group, preset: undefined, algorithm: 'adam' } : group,
  )
  const wrong = MODEL.groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 'x' } : group))
  await refused(
    { parameters: MODEL.parameters.slice(0, -1) },
    { code: 'RUN_MISMATCH', message: /it has 7 parameters, 6 given/ },
  )
  await refused(
    {
      groups: groups.map(({ preset, ...group }: { preset?: string; name: string }) =>
        preset ? { preset, ...group } : group,
      ),
    },
    { code: 'RUN_MISMATCH', message: /algorithm is 'adamw' in the run, 'adam' given/ },
  )
  await refused({ groups: wrong }, { code: 'HYPERPARAMETER_INVALID' })
  await refused({ attentions: [] }, { code: 'RUN_MISMATCH' })
  await refused({ run: 'r' }, { code: 'RUN_EXISTS' })
  await refused({ run: 'r', mode: 'create' }, { code: 'RUN_EXISTS' })
  await refused({ from: { run: 'b', checkpoint: 'best' } }, { code: 'RUN_NOT_FOUND', message: "there is no run 'b'" })
  await refused(
    { from: { run: 'nobody', checkpoint: 'best' } },
    { code: 'RUN_NOT_FOUND', message: "there is no run 'nobody'" },
  )
  await refused(
    { from: { run: 'r', checkpoint: 'worst' } },
    { code: 'NOT_FOUND', message: `run 'r' has no checkpoint 'worst'; its 2: ${id(0)}, ${id(5)}` },
  )
  const what = "from: checkpoint 'best' of run 'r'"
  await refused(
    { mode: 'resume' },
    { code: 'PARAMETER_INVALID', message: `${what} goes with mode create, mode is resume` },
  )
  await refused({ mode: 'create_or_resume' }, { code: 'PARAMETER_INVALID', message: /mode is create_or_resume$/ })
  await refused(
    { mode: 'create', checkpoint: 'x' },
    { code: 'PARAMETER_INVALID', message: `${what} and checkpoint 'x' of the run itself exclude each other` },
  )
  reseal(data, { previous_digest: '00'.repeat(32) })
  await refused({}, { code: 'CHECKPOINT_UNREADABLE', message: /step 5 of run 'r' has digest/ })
  reseal(data, ({ groups: [first, ...rest] }) => ({ groups: [{ ...first!, algorithm: 'other' }, ...rest] }))
  await refused({}, { code: 'CHECKPOINT_UNREADABLE', message: /algorithm/ })
  flip(stateFile(data), 300)
  await refused({}, { code: 'CHECKPOINT_UNREADABLE' })
  flip(manifestOf(data, 5), 30)
  await refused({}, { code: 'CHECKPOINT_UNREADABLE', message: /manifest\.json has SHA-256/ })
  writeFileSync(join(data, 'runs', 'b'), '')
  client.send({ type: 'open', protocol: 1, run: 'b', from: { run: 'r', checkpoint: id(0) }, ...MODEL })
  t.match(await client.expect('error'), { code: 'STORAGE_FAILED', message: /^the folder of run 'b' cannot be written/ })
  t.same([service.device.admittedBytes, service.device.memory.bytes], [admitted, memory])
  rmSync(join(data, 'runs', 'b'))
  await client.close()
  await service.app.close()
  const again = await start(t, data)
  const other = await RawClient.connect(again.url)
  other.send({ type: 'open', protocol: 1, run: 'b', from: { run: 'r', checkpoint: id(5) } })
  t.match(await other.expect('error'), { code: 'CHECKPOINT_UNREADABLE', message: /manifest\.json has SHA-256/ })
  t.match(await other.open({ run: 'b', from: { run: 'r', checkpoint: id(0) } }), { step: 0 }, 'an older one is whole')
})

t.test('without a data folder there is nothing to branch from, and the reason is told', async (t) => {
  const service = await startService({ lanes: 1 })
  t.teardown(() => service.app.close())
  const client = await RawClient.connect(service.url)
  client.send({ type: 'open', protocol: 1, run: 'b', from: { run: 'r', checkpoint: 'best' }, ...MODEL })
  t.match(await client.expect('error'), {
    code: 'PARAMETER_INVALID',
    message: "from: checkpoint 'best' of run 'r': this service keeps none, it has no data folder",
  })
  await client.close()
})

t.test('two runs may branch from each other at the same time, and at max_runs no source is pushed out', async (t) => {
  const service = await start(t, t.testdir({}), { max_runs: 3 })
  for (const run of ['a', 'b']) await (await train(service, { run, last: 5 })).client.close()
  const clients = await Promise.all(['b2', 'a2'].map(() => RawClient.connect(service.url)))
  clients[0]!.send({ type: 'open', protocol: 1, run: 'b2', from: { run: 'a', checkpoint: id(5) } })
  clients[1]!.send({ type: 'open', protocol: 1, run: 'a2', from: { run: 'b', checkpoint: id(5) } })
  const answers = await Promise.all(clients.map((client) => client.next()))
  t.ok(answers.some(({ type }) => type === 'opened'))
  t.ok(service.runs.list().length <= 3)
  for (const client of clients) await client.close()
})

t.test('the Node client branches, and after a lost connection goes on with its own run', async (t) => {
  const service = await start(t, t.testdir({}))
  await (await train(service, { last: 5 })).client.close()
  const client = await connect(service.url, { backoff: { first_seconds: 0.01 } })
  const parameters = MODEL.parameters.map((parameter) => {
    const elements = parameter.shape.reduce((product, size) => product * size, 1)
    return { ...parameter, data: new Float32Array(elements) }
  })
  const { groups } = MODEL
  const run = await client.open({ run: 'b', groups, parameters, from: { run: 'r', checkpoint: id(5) } })
  t.match([run.step_count, run.digest], [5, reference[4]!.digest])
  const gradients = parameters.map(({ data }, i) => gradientsOf(6)[i] ?? data)
  const { digest } = await run.step(gradients)
  for (const socket of service.app.websocketServer.clients) socket.terminate()
  t.match(await run.step(gradients), { step: 7 })
  await run.reopen()
  t.match(run.opened, { run: 'b', step: 7, epoch: 3 })
  t.not(digest, reference[5]!.digest, 'its gradients were others')
  await client.close()
})
