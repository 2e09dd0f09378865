import t, { type Test } from 'tap'
import type { OpenOptions, Parameter, Run } from '../../src/client/client.js'
import { owedOf } from '../../src/client/settings.js'
import type { ReceiptFrame } from '../../src/wire/frame.js'
import { meanOf } from '../replicas/oracle.js'
import { randomFrom } from './model.js'
import { QUICK, startProxy } from './service.js'
import { clientOf, fresh, service, turn } from './trainer.js'

const GROUPS = [
  { name: 'm', algorithm: 'muon', lr: 0.02 },
  { name: 's', algorithm: 'sgd', lr: 0.1, momentum: 0.9 },
]
const LONG = { min_replicas: 1, deadline_seconds: 3600 }
type Replica = { run: Run; parameters: Parameter[] }

function parametersOf(): Parameter[] {
  const random = randomFrom(4)
  return [
    { name: 'w', shape: [6, 4], group: 'm', data: Float32Array.from({ length: 24 }, random) },
    { name: 'b', shape: [5], group: 's', data: Float32Array.from({ length: 5 }, random) },
  ]
}

const gradientsOf = (replica: number, step: number) => {
  const random = randomFrom(100 * replica + step)
  return [24, 5].map((length) => Float32Array.from({ length }, random))
}

async function open(t: Test, name: string, options: Partial<OpenOptions> & { replica: number; replicas?: number }) {
  const { replica, replicas = 2, ...more } = options
  const parameters = parametersOf()
  const client = await clientOf(t)
  const member = { rank: 0, world_size: 1, replica, replicas }
  const run = await client.open({ run: name, groups: GROUPS, parameters, member, ...more })
  return { run, parameters }
}

const weights = ({ parameters }: Replica) => parameters.map(({ data }) => data)

t.test('replicas train with the mean of what they send, over connections that break', async (t) => {
  const alone = parametersOf()
  const sole = await (await clientOf(t)).open({ run: fresh(), groups: GROUPS, parameters: alone })
  const name = fresh()
  const replicas: Replica[] = []
  for (const replica of [0, 1, 2]) {
    const proxy = await startProxy(service.port, [2_500, 2_000 + 300 * replica, 2_700])
    t.teardown(() => proxy.close())
    const parameters = parametersOf()
    const client = await clientOf(t, { ...QUICK, retries: 30, transport: 'websocket' }, proxy.url)
    const member = { rank: 0, world_size: 1, replica, replicas: 3 }
    replicas.push({ parameters, run: await client.open({ run: name, groups: GROUPS, parameters, member }) })
  }
  t.match(replicas[2]!.run.members, [{ replica: 0 }, { replica: 1 }, { replica: 2, connected: true }])
  for (const step of [1, 2, 3]) {
    const sent = [0, 1, 2].map((replica) => gradientsOf(replica, step))
    const means = [0, 1].map((p) => meanOf(sent.map((each, r) => ({ values: each[p]!, weight: r + 1 }))))
    await sole.step(means)
    const receipts = await Promise.all(replicas.map(({ run }, r) => run.step(sent[r]!, { weight: r + 1 })))
    for (const { digest, contributed, contributors } of receipts) {
      t.match({ digest, contributed, contributors }, { digest: receipts[0]!.digest, contributed: true })
      t.same(
        contributors?.map(({ weight }) => weight),
        [1, 2, 3],
      )
    }
  }
  for (const replica of replicas)
    t.same(
      weights(replica),
      alone.map(({ data }) => data),
    )
})

t.test('a replica that is late has the same weights, and what it alone said is said again', async (t) => {
  const name = fresh()
  const zero = await open(t, name, { replica: 0, quorum: LONG })
  // Nobody else is connected: the step is closed with one.
  t.match(await zero.run.step(gradientsOf(0, 1)), { contributors: [{ replica: 0 }] })
  const one = await open(t, name, { replica: 1 })
  t.match(one.run.step_count, 1)
  // It has the weights of step 1 from replica 0.
  for (const [i, { data }] of one.parameters.entries()) data.set(zero.parameters[i]!.data as Float32Array)
  one.run.begin({ groups: { m: { lr: 0.5 }, s: { lr: 0.1 } } })
  const [w, b] = gradientsOf(1, 2)
  await closeWithout(name, 1, () => zero.run.step(gradientsOf(0, 2)))
  one.run.gradient('w', w!)
  one.run.gradient('b', b!)
  const receipt = await one.run.end()
  t.match(receipt, { step: 2, contributed: false, contributors: [{ replica: 0 }] })
  t.same(weights(one), weights(zero))
  const receipts = await Promise.all([
    zero.run.step(gradientsOf(0, 3)),
    one.run.step(gradientsOf(1, 3), { groups: { s: { lr: 0.2 } } }),
  ])
  for (const receipt of receipts) t.match(receipt, { contributed: true, groups: { m: { lr: 0.5 }, s: { lr: 0.2 } } })
  t.same(weights(one), weights(zero))
})

t.test('hyperparameters that came too late with their replica are in force from the next step on', async (t) => {
  const name = fresh()
  const zero = await open(t, name, { replica: 0, quorum: LONG })
  const one = await open(t, name, { replica: 1 })
  await closeWithout(name, 1, () => zero.run.step(gradientsOf(0, 1)))
  const late = await one.run.step(gradientsOf(1, 1), { groups: { m: { lr: 0.25 }, s: { lr: 0.1 } } })
  t.equal(late.contributed, false)
  t.not(late.groups.m?.lr, 0.25)
  const [, receipt] = await Promise.all([
    zero.run.step(gradientsOf(0, 2)),
    one.run.step(gradientsOf(1, 2), { groups: { s: { lr: 0.2 } } }),
  ])
  t.match(receipt, { contributed: true, groups: { m: { lr: 0.25 }, s: { lr: 0.2 } } })
  t.same(weights(one), weights(zero))
})

/** Has the service take a replica for one that is not connected while `work` is done. */
async function closeWithout(name: string, replica: number, work: () => Promise<unknown>): Promise<void> {
  const { members } = service.runs.get(name).intake
  Object.defineProperty(members, 'connectedReplicas', { value: [1 - replica], configurable: true })
  await work()
  Reflect.deleteProperty(members, 'connectedReplicas')
}

t.test('what others have skipped is not missed by a replica that is late', async (t) => {
  const name = fresh()
  const zero = await open(t, name, { replica: 0, quorum: LONG })
  const one = await open(t, name, { replica: 1 })
  await closeWithout(name, 1, () => zero.run.step([gradientsOf(0, 1)[0]], { skipped: ['b'] }))
  t.match(await one.run.step(gradientsOf(1, 1)), { contributed: false, applied: 1 })
  t.same(weights(one), weights(zero))
  // And the other way around: a parameter that it skips has an update.
  await closeWithout(name, 1, () => zero.run.step(gradientsOf(0, 2)))
  t.match(await one.run.step({}, { skipped: ['w', 'b'] }), { contributed: false, applied: 2 })
  t.same(weights(one), weights(zero))
})

t.test('who is further behind is told where the others are', async (t) => {
  const name = fresh()
  const zero = await open(t, name, { replica: 0, quorum: LONG })
  const one = await open(t, name, { replica: 1 })
  await closeWithout(name, 1, async () => {
    await zero.run.step(gradientsOf(0, 1))
    await zero.run.step(gradientsOf(0, 2))
  })
  await t.rejects(one.run.step(gradientsOf(1, 1)), { code: 'STEP_CONFLICT', fields: { expected_step: 3 } })
})

t.test('a quorum that does not come is waited for, as often as it may be retried', async (t) => {
  const name = fresh()
  const quorum = { min_replicas: 2, deadline_seconds: 0.005 }
  const zero = await open(t, name, { replica: 0, quorum })
  const one = await open(t, name, { replica: 1 })
  const { lost_quorums_total } = service.metrics
  const lost = async () => (await lost_quorums_total.get()).values[0]!.value
  const before = await lost()
  const step = zero.run.step(gradientsOf(0, 1))
  while ((await lost()) < before + 2) await turn()
  t.match(await Promise.all([step, one.run.step(gradientsOf(1, 1))]), [{ contributed: true }, { contributed: true }])
  t.equal(zero.run.opened.epoch, 1, 'over one connection')
  const impatient = parametersOf()
  const client = await clientOf(t, { ...QUICK, retries: 1 })
  const member = { rank: 0, world_size: 1, replica: 0, replicas: 2 }
  const run = await client.open({ run: fresh(), groups: GROUPS, parameters: impatient, member, quorum })
  await t.rejects(run.step(gradientsOf(0, 1)), { code: 'QUORUM_LOST', retryable: true })
})

async function refusedForNaN(): Promise<number> {
  const { values } = await service.metrics.refused_gradients_total.get()
  return values.find(({ labels }) => labels.code === 'GRADIENT_NOT_FINITE')?.value ?? 0
}

t.test('a gradient with NaN rejects the step of its replica, which may take it again', async (t) => {
  const name = fresh()
  const zero = await open(t, name, { replica: 0 })
  const one = await open(t, name, { replica: 1 })
  const step = zero.run.step(gradientsOf(0, 1))
  const [w, b] = gradientsOf(1, 1)
  const bad = Float32Array.from(w!)
  bad[3] = Number.NaN
  const rejected = { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['w'] }, message: /rank 0 of replica 1/ }
  await t.rejects(one.run.step([bad, b]), rejected)
  // One by one, it is refused before the step is ended.
  one.run.gradient('w', bad)
  while ((await refusedForNaN()) < 2) await turn()
  one.run.gradient('b', b!)
  await t.rejects(one.run.end(), rejected)
  // The other replica does not skip what this one leaves out.
  await t.rejects(one.run.step([bad, b], { skip_refused: true }), { code: 'STEP_CONFLICT', message: /by replica 0/ })
  t.match(await Promise.all([step, one.run.step([w, b])]), [{ applied: 2 }, { applied: 2 }])
  t.same(weights(one), weights(zero))
})

t.test('only what is not in force is said again', (t) => {
  const receipt = { groups: { g: { lr: 1, betas: [0.9, 0.95] } } } as unknown as ReceiptFrame
  t.equal(owedOf(undefined, receipt), undefined)
  t.equal(owedOf({ type: 'step', step: 1, groups: { g: { lr: 1, betas: [0.9, 0.95] } } }, receipt), undefined)
  t.same(owedOf({ type: 'step', step: 1, groups: { g: { lr: 2, betas: [0.9, 0.95] }, h: {} } }, receipt), {
    g: { lr: 2 },
  })
  t.end()
})
