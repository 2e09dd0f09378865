import t from 'tap'
import type { ServiceError } from '../../src/errors.js'
import type { Plan } from '../../src/optimizer/plan.js'
import type { Connection } from '../../src/run/members/member.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { normal, RawClient, startService } from '../service.js'

const GROUPS = [{ name: 'g', algorithm: 'adamw' }]
const PARAMETERS = [
  { name: 'a', shape: [8], group: 'g' },
  { name: 'b', shape: [16], group: 'g' },
]
const GRADIENTS = [normal(1, 8), normal(2, 16)]
const frame = (run: string, keys: Partial<OpenFrame> = {}): OpenFrame => ({
  type: 'open',
  protocol: 1,
  run,
  groups: GROUPS,
  parameters: PARAMETERS,
  ...keys,
})
const connection = (told: ServiceError[] = []): Connection => ({
  fence: () => {},
  expel: (error) => told.push(error),
  changed: () => {},
})

t.test('no more runs than allowed, opened side by side too', async (t) => {
  const { runs, app } = await startService({ max_runs: 2 })
  const opened = await Promise.allSettled(['a', 'b', 'c'].map((name) => runs.open(frame(name), connection())))
  t.same(
    opened.map(({ status }) => status),
    ['fulfilled', 'fulfilled', 'rejected'],
  )
  t.match(opened[2], {
    reason: { code: 'OVER_CAPACITY', message: /^the service holds 2 runs, at most 2: delete one .* --max-runs$/ },
  })
  await runs.delete('a')
  t.match(await runs.open(frame('c'), connection()), { resumed: false })
  await app.close()
})

t.test('one name is opened by one connection at a time, in the order of the calls', async (t) => {
  const { runs, app } = await startService()
  const told: ServiceError[] = []
  const [first, second] = [connection(), connection(told)]
  const opened = await Promise.allSettled([runs.open(frame('r'), first), runs.open(frame('r'), second)])
  t.match(opened, [{ status: 'fulfilled' }, { status: 'rejected', reason: { code: 'RUN_BUSY' } }])
  t.ok(runs.get('r').connected)
  const taken = [runs.open(frame('r', { takeover: true }), second), runs.delete('r'), runs.open(frame('r'), first)]
  t.match(await Promise.all(taken), [{ resumed: true }, undefined, { resumed: false }])
  t.match(told, [{ code: 'RUN_NOT_FOUND' }], 'the connection that had the run is told that it was deleted')
  t.equal(runs.get('r').epoch, 1, 'a deleted run leaves nothing behind')
  await app.close()
})

t.test('a refused open leaves no run, no epoch and no memory behind', async (t) => {
  const { runs, device, app } = await startService({ max_parameters: 2, state_bytes_limit: Number.MAX_SAFE_INTEGER })
  const three = [...PARAMETERS, { name: 'c', shape: [1], group: 'g' }]
  await t.rejects(runs.open(frame('r', { parameters: three }), connection()), {
    code: 'OVER_CAPACITY',
    message: /at most 2 parameters, given are 3/,
  })
  t.same([runs.list(), device.admittedBytes], [[], 0])
  await runs.open(frame('r'), connection())
  const mismatch = { takeover: true, parameters: PARAMETERS.slice(0, 1) }
  await t.rejects(runs.open(frame('r', mismatch), connection()), {
    code: 'RUN_MISMATCH',
    message: /it has 2 parameters, 1 given/,
  })
  t.equal(runs.get('r').epoch, 1)
  await app.close()
})

t.test('an open that the device refuses leaves no run and no memory behind', async (t) => {
  const { runs, device, app } = await startService({ lanes: 1 })
  const kernel = { kind: 'sgd', gradient_dtype: 'float7', update_dtype: 'float32' } as unknown as Plan['kernel']
  const plan = { kernel, tasks: [{ dims: [1], offset: 0 }], scalars: {}, scale: 1, decay: 0, rms_factor: 1 }
  const demand = { plan, gradient_bytes: 4, update_bytes: 4, state_bytes: 4 }
  await t.rejects(device.load([demand]), { code: 'DEVICE_FAILED' })
  await t.rejects(runs.open(frame('r'), connection()), { code: 'DEVICE_FAILED' })
  t.same([runs.list(), device.admittedBytes], [[], 0])
  await app.close()
})

t.test('another protocol is refused', async (t) => {
  const { runs, app } = await startService({ lanes: 1 })
  await t.rejects(runs.open(frame('r', { protocol: 2 }), connection()), {
    code: 'PROTOCOL_UNSUPPORTED',
    message: 'protocol 2 is not spoken here, expected 1',
  })
  await app.close()
})

t.test('a step that lacks many parameters names ten of them and counts the rest', async (t) => {
  const { runs, app } = await startService({ lanes: 1 })
  const parameters = Array.from({ length: 13 }, (_, i) => ({ name: `p${i}`, shape: [1], group: 'g' }))
  const { run, member } = await runs.open(frame('r', { parameters }), connection())
  const end = { step: 1, skipped: [0], weight: 1 }
  await t.rejects(run.intake.end(member, end), { code: 'STEP_INCOMPLETE', message: /'p1', .*'p10' and 2 more$/ })
  await app.close()
})

t.test('given groups replace the schedule: at once between steps, after the step in progress within one', async (t) => {
  const service = await startService()
  const lr = (value: number) => [{ name: 'g', algorithm: 'adamw', lr: value }]
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: lr(1), parameters: PARAMETERS })
  await client.step(1, GRADIENTS)
  client.gradient(0, 2, { values: GRADIENTS[0]! })
  client.send({ type: 'step', step: 2, groups: {}, gradient_scale: 2 })
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT' }, 'the gradient was there first')
  const second = await RawClient.connect(service.url)
  t.match(await second.open({ run: 'r', groups: lr(3), takeover: true }), { groups: { g: { lr: 1 } }, ahead: [0] })
  t.match(await second.step(2, GRADIENTS), { groups: { g: { lr: 1 } } })
  t.match(await second.step(3, GRADIENTS), { groups: { g: { lr: 3 } } })
  const third = await RawClient.connect(service.url)
  t.match(await third.open({ run: 'r', groups: lr(5), takeover: true }), { groups: { g: { lr: 5 } } })
  await third.close()
  await service.app.close()
})

t.test('the last receipts are kept, and a repeated end gives the last one again', async (t) => {
  const service = await startService({ receipts_kept: 2 })
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const run = service.runs.get('r')
  const heard: number[] = []
  run.on('receipt', ({ step }) => heard.push(step))
  for (const step of [1, 2, 3]) await client.step(step, GRADIENTS)
  client.send({ type: 'end', step: 3 })
  t.match(await client.expect('receipt'), { step: 3, replayed: true })
  t.same(
    run.receipts(0).map(({ receipt }) => receipt.step),
    [2, 3],
  )
  t.same(
    run.receipts(2).map(({ receipt }) => receipt.step),
    [3],
  )
  t.same(heard, [1, 2, 3])
  await client.close()
  await service.app.close()
})

t.test('a run shows its places: state, count and record, none before the first step', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const run = service.runs.get('r')
  t.match(run.place(0), { algorithm: 'adamw', count: 0, state_bytes: 0, record: undefined })
  t.same(run.stateTensors(0), [])
  client.gradient(1, 1, { values: GRADIENTS[1]! })
  client.send({ type: 'end', step: 1, skipped: [0] })
  await client.expect('receipt')
  t.match(run.place(1), { count: 1, state_bytes: 2 * 16 * 4, record: { gradient_scale: 1 } })
  t.equal(run.stateBytes, 2 * 16 * 4)
  const tensors = run.stateTensors(1)
  t.same(
    tensors.map(({ name, shape }) => [name, shape]),
    [
      ['exp_avg', [16]],
      ['exp_avg_sq', [16]],
    ],
  )
  await client.step(2, GRADIENTS)
  t.equal(service.device.memory.bytes, (2 * 8 + 4 * 16) * 4, 'a reader keeps the tensors of its step')
  for (const { tensor } of tensors) service.device.memory.release(tensor)
  t.equal(service.device.memory.bytes, run.stateBytes)
  t.throws(() => run.place(2), { code: 'PARAMETER_UNKNOWN' })
  await client.close()
  await service.app.close()
})
