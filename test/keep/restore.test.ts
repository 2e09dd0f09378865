import { mkdirSync, readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { gradientsOf, known, MODEL, type Trace, traceOf, train, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, type Service, startService, until } from '../service.js'
import { checkpoints, flip, id, manifestOf, reseal, runFolder, start, stateFile } from './data-folder.js'

const LAST = 12
const DURABILITIES = ['checkpoint', 'journal'] as const

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})

/** Ends the service as a crash does: no step is drained, and nothing more is written to the disk. */
async function restart(
  service: Service,
  data: string,
  settings: Parameters<typeof startService>[0] = {},
): Promise<Service> {
  await service.app.close()
  return start(data, settings)
}

for (const durability of DURABILITIES) {
  t.test(`${durability}: a run that was interrupted goes on with the bits of one that was not`, async (t) => {
    const data = t.testdir({})
    for (const stop of [1, 5, 7, 10]) {
      const folder = join(data, String(stop))
      const service = await start(folder, { durability })
      const before = await train(service, { last: stop })
      t.same(known(before.traces), known(reference.slice(0, stop)))
      t.ok(before.traces.every(({ durable }) => durable === (durability === 'journal')))
      t.equal(before.opened.resumed, false)
      await before.client.close()
      const again = await restart(service, folder, { durability })
      const after = await train(again, { last: LAST, open: { mode: 'resume' } })
      const durable = durability === 'journal' ? stop : 5 * Math.floor(stop / 5)
      const digest = durable > 0 ? reference[durable - 1]!.digest : before.opened.digest
      t.match(after.opened, { step: durable, resumed: true, epoch: 2, digest, ahead: [], note: undefined })
      t.same(known(after.traces), known(reference.slice(durable)), `stopped after step ${stop}`)
      await after.client.close()
      await again.app.close()
    }
  })
}

t.test('a cold run is another one', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'cold', ...MODEL })
  // Step 1 with the gradients of step 2: a fresh run has neither momentum nor moments.
  const gradients = gradientsOf(2)
  for (const [i, values] of gradients.entries()) client.gradient(i, 1, { values: values! })
  client.send({ type: 'end', step: 1 })
  t.not(traceOf(client, await client.expect('receipt')).updates, reference[1]!.updates)
  await client.close()
  await service.app.close()
})

t.test('a shutdown takes a checkpoint of what none has, and of nothing twice', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 3 })
  const closed = client.closed()
  await service.drain()
  t.match(await closed, { code: 1012 })
  t.same(checkpoints(data), [id(0), id(3)])
  const again = await start(data)
  await again.restored
  await again.drain()
  t.same(checkpoints(data), [id(0), id(3)])
})

t.test('a step that has begun at a shutdown is not in the checkpoint, and is sent again', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal', drain_seconds: 0 })
  const { client } = await train(service, { last: 2 })
  const [first] = gradientsOf(3)
  client.updates.clear()
  client.gradient(0, 3, { values: first! })
  await until(() => service.runs.get('r').ahead.length === 1)
  await service.drain()
  const again = await start(data, { durability: 'journal' })
  const after = await train(again, { last: 4, open: { mode: 'resume' } })
  t.match(after.opened, { step: 2, ahead: [] })
  t.same(known(after.traces), known(reference.slice(2, 4)))
  await after.client.close()
  await again.app.close()
})

t.test('the last step is replayed after a restart: its receipt may have been lost', async (t) => {
  for (const durability of DURABILITIES) {
    const data = t.testdir({})
    const service = await start(data, { durability })
    const { client } = await train(service, { last: 5 })
    const clipped = [...client.updates.values()].some(({ row_scale }) => row_scale)
    t.ok(clipped, 'the step scales rows')
    await client.close()
    const again = await restart(service, data, { durability })
    const replay = await RawClient.connect(again.url)
    await replay.open({ run: 'r', mode: 'resume' })
    const trace = await trainStep(replay, 5)
    t.same(known([trace]), known(reference.slice(4, 5)))
    t.ok([...replay.updates.values()].every(({ replayed }) => replayed))
    t.same(known([await trainStep(replay, 6)]), known(reference.slice(5, 6)))
    await replay.close()
    await again.app.close()
  }
})

t.test('groups that a connection replaced hold after a restart, though no step has been taken with them', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal' })
  const { client } = await train(service, { last: 2 })
  await client.close()
  const groups = MODEL.groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 0.5 } : group))
  const second = await RawClient.connect(service.url)
  await second.open({ run: 'r', mode: 'resume', groups })
  await second.close()
  const again = await restart(service, data, { durability: 'journal' })
  const third = await RawClient.connect(again.url)
  t.match(await third.open({ run: 'r', mode: 'resume' }), {
    step: 2,
    epoch: 3,
    groups: { sgd: { lr: 0.5 }, muon: { lr: 0.02 } },
  })
  // The groups hold from the step after the one that has begun.
  third.gradient(0, 3, { values: gradientsOf(3)[0]! })
  await until(() => again.runs.get('r').ahead.length === 1)
  await third.close()
  const fourth = await RawClient.connect(again.url)
  const later = groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 0.25 } : group))
  t.match(await fourth.open({ run: 'r', mode: 'resume', groups: later, takeover: true }), {
    ahead: [0],
    groups: { sgd: { lr: 0.5 } },
  })
  await fourth.close()
  const last = await restart(again, data, { durability: 'journal' })
  const fifth = await RawClient.connect(last.url)
  t.match(await fifth.open({ run: 'r', mode: 'resume' }), { step: 2, ahead: [], groups: { sgd: { lr: 0.5 } } })
  await trainStep(fifth, 3)
  await fifth.close()
  const after = await restart(last, data, { durability: 'journal' })
  const sixth = await RawClient.connect(after.url)
  t.match(await sixth.open({ run: 'r', mode: 'resume' }), { step: 3, groups: { sgd: { lr: 0.25 } } })
  await trainStep(sixth, 4)
  await sixth.close()
  const seventh = await restart(after, data, { durability: 'journal' })
  await seventh.restored
  t.match(seventh.runs.get('r').opened(true), { step: 4, groups: { sgd: { lr: 0.25 } } })
  await seventh.app.close()
})

t.test('a run goes back to a checkpoint; what came after it is dropped', async (t) => {
  for (const durability of DURABILITIES) {
    const data = t.testdir({})
    const service = await start(data, { durability })
    const { client } = await train(service, { last: LAST })
    t.same(checkpoints(data), [id(0), id(5), id(10)])
    // A connection has begun a step, and another one takes the run over.
    client.gradient(0, LAST + 1, { values: gradientsOf(LAST + 1)[0]! })
    const back = await train(service, { last: 7, open: { mode: 'resume', checkpoint: id(5), takeover: true } })
    t.match(await client.closed(), { code: 4409 })
    t.match(back.opened, { step: 5, resumed: true, epoch: 2, digest: reference[4]!.digest, ahead: [] })
    t.same(checkpoints(data), [id(0), id(5)])
    t.same(known(back.traces), known(reference.slice(5, 7)))
    t.same(
      service.runs
        .get('r')
        .receipts(0)
        .map(({ receipt }) => receipt.step),
      [1, 2, 3, 4, 5, 6, 7],
    )
    await back.client.close()
    const again = await restart(service, data, { durability })
    const after = await train(again, { last: LAST, open: { mode: 'resume' } })
    t.equal(after.opened.step, durability === 'journal' ? 7 : 5)
    t.same(known(after.traces), known(reference.slice(after.opened.step)))
    await after.client.close()
    await again.app.close()
  }
})

t.test('a checkpoint to go back to that is not there or cannot be had changes nothing', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 6 })
  const other = await RawClient.connect(service.url)
  const refused = async (open: object, error: object) => {
    other.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume', takeover: true, ...open })
    t.match(await other.expect('error'), error)
  }
  await refused(
    { checkpoint: 'best' },
    { code: 'NOT_FOUND', message: `run 'r' has no checkpoint 'best'; its 2: ${id(0)}, ${id(5)}` },
  )
  await refused({ checkpoint: id(5), takeover: false }, { code: 'RUN_BUSY' })
  await refused(
    { checkpoint: id(5), mode: 'create_or_resume' },
    { code: 'PARAMETER_INVALID', message: /goes with mode resume, mode is create_or_resume$/ },
  )
  await refused(
    { checkpoint: id(5), mode: undefined },
    { code: 'PARAMETER_INVALID', message: /mode is create_or_resume$/ },
  )
  await refused({ checkpoint: id(5), run: 'nobody' }, { code: 'RUN_NOT_FOUND' })
  await refused({ checkpoint: id(5), parameters: MODEL.parameters.slice(1) }, { code: 'RUN_MISMATCH' })
  flip(stateFile(data), 300)
  const memory = service.device.memory.bytes
  await refused(
    { checkpoint: id(5) },
    {
      code: 'CHECKPOINT_UNREADABLE',
      message: /state-00001-of-0000\d\.safetensors has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
    },
  )
  flip(stateFile(data), 300)
  reseal(data, { previous_digest: '00'.repeat(32) })
  await refused({ checkpoint: id(5) }, { code: 'CHECKPOINT_UNREADABLE', message: /step 5 of run 'r' has digest/ })
  t.equal(service.device.memory.bytes, memory)
  t.match(await trainStep(client, 7), { digest: reference[6]!.digest })
  await other.close()
  await client.close()
  await service.app.close()
})

t.test('a run on the disk that nobody has restored is deleted as well', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  await (await train(service, { last: 1 })).client.close()
  t.equal((await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })).status, 204)
  t.same(readdirSync(join(data, 'runs')), [])
  t.equal((await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })).status, 404)
  await service.app.close()
})

t.test(
  'what a crash leaves unfinished is removed: a checkpoint without a manifest, a run that was never opened, a deletion',
  async (t) => {
    const data = t.testdir({})
    const service = await start(data)
    await (await train(service, { last: 5 })).client.close()
    await service.app.close()
    rmSync(manifestOf(data, 5))
    mkdirSync(join(data, 'runs', 'unopened', 'journal'), { recursive: true })
    mkdirSync(join(data, 'runs', '.deleted-1', 'checkpoints'), { recursive: true })
    const again = await start(data)
    await again.restored
    t.same(readdirSync(join(data, 'runs')), ['r'])
    t.same(checkpoints(data), [id(0)])
    const client = await RawClient.connect(again.url)
    t.match(await client.open({ run: 'r', mode: 'resume' }), { step: 0, resumed: true })
    t.match(await client.open({ run: 'unopened', mode: 'create' }).catch((error) => error.message), /FRAME_UNEXPECTED/)
    await again.app.close()
  },
)

t.test('a journal without its checkpoint is an error', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal', checkpoint_steps: 0 })
  await (await train(service, { last: 3 })).client.close()
  await service.app.close()
  rmSync(join(runFolder(data), 'checkpoints'), { recursive: true })
  const again = await start(data, { durability: 'journal' })
  await again.restored
  t.match(again.runs.stored.get('r'), /has a journal and no checkpoint that it goes on from$/)
  await again.app.close()
})

t.test('a service that keeps no journal any more takes the steps of one into a checkpoint', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal' })
  await (await train(service, { last: 7 })).client.close()
  const again = await restart(service, data)
  await again.restored
  t.same(checkpoints(data), [id(0), id(5), id(7)])
  t.same(readdirSync(join(runFolder(data), 'journal')), [])
  const after = await train(again, { last: LAST, open: { mode: 'resume' } })
  t.equal(after.opened.step, 7)
  t.same(known(after.traces), known(reference.slice(7)))
  await after.client.close()
  await again.app.close()
})

t.test('another kind of device goes on from a checkpoint and a journal, and says so', async (t) => {
  const data = t.testdir({})
  const settings = { durability: 'journal' } as const
  const service = await start(data, settings)
  await (await train(service, { last: 7 })).client.close()
  await service.app.close()
  reseal(data, { device: { kind: 'cuda', name: 'cuda:0 NVIDIA H200', onnxruntime: '1.30.0', processor: '' } })
  const again = await start(data, settings)
  const after = await train(again, { last: LAST, open: { mode: 'resume' } })
  t.match(after.opened, {
    step: 7,
    digest: reference[6]!.digest,
    note: /^restored from step-0{11}5: its last steps were computed on cuda:0 NVIDIA H200 with ONNX Runtime 1\.30\.0, here is cpu .*: results may differ in their last bits$/,
  })
  // In truth the device was the same, so the bits are those of the undisturbed run.
  t.same(known(after.traces), known(reference.slice(7)))
  t.match(await (await fetch(`${again.http}/v1/runs/r`)).json(), { note: /^restored from/, durable_step: LAST })
  await after.client.close()
  await again.app.close()
})

t.test('an open waits for its run to be restored; until then the service is not ready', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal' })
  for (const run of ['a', 'b', 'c']) await (await train(service, { run, last: 4 })).client.close()
  const again = await restart(service, data, { durability: 'journal' })
  const ready = await fetch(`${again.http}/readyz`)
  t.match([ready.status, await ready.json()], [503, { code: 'RESTORING' }])
  t.match(await (await fetch(`${again.http}/v1/runs`)).json(), { stored: [{ status: 'waiting' }] })
  t.match(await (await fetch(`${again.http}/v1/runs/c`)).json(), { code: 'RESTORING' })
  const client = await RawClient.connect(again.url)
  t.match(await client.open({ run: 'c', mode: 'resume' }), { step: 4, digest: reference[3]!.digest })
  await again.restored
  t.equal((await fetch(`${again.http}/readyz`)).status, 200)
  t.same(
    again.runs
      .list()
      .map(({ name }) => name)
      .sort(),
    ['a', 'b', 'c'],
  )
  await client.close()
  await again.app.close()
})

t.test('a service that is closed while it restores ends', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  for (const run of ['a', 'b', 'c']) await (await train(service, { run, last: 1 })).client.close()
  const again = await restart(service, data)
  await again.app.close()
  t.ok(again.runs.list().length < 3)
})
