import t from 'tap'
import { evenly, gradientsOf, type Mate, MODEL } from '../members/crew.js'
import { startService, told, until } from '../service.js'
import { closeTroop, openTroop, receipts, send, updatesOf } from './troop.js'

const service = await startService()
t.teardown(() => service.app.close())
const SENT = [0, 1, 2].map((replica) => gradientsOf(MODEL, { seed: 900 + 50 * replica, steps: 4 }))
const BRIEF = { min_replicas: 2, deadline_seconds: 0.02 }
/** No test waits for it. */
const LONG = { min_replicas: 2, deadline_seconds: 3600 }
const SPLIT = evenly(MODEL, 2)

const open = (run: string, quorum?: { min_replicas: number; deadline_seconds: number }) =>
  openTroop(service.url, run, { model: MODEL, split: SPLIT, replicas: 3, quorum }) as Promise<[Mate[], Mate[], Mate[]]>
const sendStep = (troop: Mate[][], step: number, which: readonly number[]) => {
  for (const r of which) send(troop[r]!, step, { gradients: SENT[r]![step - 1]! })
}
const contributors = (...which: number[]) => which.map((replica) => ({ replica, weight: 1 }))

t.test('a late replica is told, gets the updates and the receipt, and goes on', async (t) => {
  const troop = await open('late', BRIEF)
  const [zero, one, two] = troop
  t.match(zero[0]!.opened, {
    member: { rank: 0, world_size: 2, replica: 0, replicas: 3 },
    quorum: BRIEF,
    members: [{ rank: 0, replica: 0, connected: true }, ...Array(5).fill({ connected: false })],
  })
  // Of the late replica one rank has ended, and the other has sent a part and half of another one.
  const [early, slow] = two as [Mate, Mate]
  for (const p of early.own) early.send(p, 1, SENT[2]![0]![p]!)
  early.end(1)
  slow.send(0, 1, SENT[2]![0]![0]!)
  slow.client.send({ type: 'step', step: 1 })
  sendStep(troop, 1, [1, 0])
  for (const receipt of (await Promise.all([receipts(zero), receipts(one)])).flat())
    t.match(receipt, { contributors: contributors(0, 1), contributed: true, replayed: false })
  const conflict = { code: 'STEP_CONFLICT', left_out: true, step: 1, expected_step: 2 }
  t.match(await early.error(), { ...conflict, message: /step 1 was closed without replica 2/ })
  t.match(await early.receipt(), { step: 1, contributors: contributors(0, 1), contributed: false })
  for (const p of slow.own) slow.send(p, 1, SENT[2]![0]![p]!, 8)
  slow.client.send({ type: 'step', step: 1 })
  slow.end(1)
  t.match(await slow.error(), conflict)
  t.match(await slow.receipt(), { step: 1, contributed: false, replayed: false })
  t.same(updatesOf(two, MODEL), updatesOf(zero, MODEL))
  sendStep(troop, 2, [0, 1, 2])
  for (const receipt of (await Promise.all(troop.map(receipts))).flat())
    t.match(receipt, { step: 2, contributors: contributors(0, 1, 2), contributed: true })
  t.same(updatesOf(two, MODEL), updatesOf(zero, MODEL))
  const left = await service.metrics.left_out_replicas_total.get()
  t.equal(left.values[0]!.value, 1)
  await closeTroop(troop)
})

t.test('a replica that sends nothing before the step is closed is told with its first frame', async (t) => {
  const troop = await open('silent', BRIEF)
  const [zero, one, two] = troop
  sendStep(troop, 1, [0, 1])
  await Promise.all([receipts(zero), receipts(one)])
  const [first, second] = two as [Mate, Mate]
  // A rank may give up its step at once; the other one is told by its `end`.
  first.client.send({ type: 'step', step: 1 })
  t.match(await first.error(), { code: 'STEP_CONFLICT', left_out: true, expected_step: 2 })
  first.end(1)
  second.end(1)
  t.match(await second.error(), { code: 'STEP_CONFLICT', left_out: true, expected_step: 2 })
  t.match(await receipts(two), [{ contributed: false }, { contributed: false }])
  t.same(updatesOf(two, MODEL), updatesOf(one, MODEL))
  await closeTroop(troop)
})

t.test('who is told and goes on without its updates has none of them', async (t) => {
  const troop = await open('hasty', BRIEF)
  const [zero, one, two] = troop
  sendStep(troop, 1, [0, 1])
  await Promise.all([receipts(zero), receipts(one)])
  for (const mate of two) {
    mate.send(mate.own[0]!, 1, SENT[2]![0]![mate.own[0]!]!)
    t.match(await mate.error(), { left_out: true })
  }
  sendStep(troop, 2, [0, 1, 2])
  await Promise.all(troop.map(receipts))
  // Step 2 is finished, and the updates of step 1 are kept for nobody.
  two[0]!.end(1)
  t.match(await two[0]!.error(), { code: 'STEP_CONFLICT', expected_step: 3, left_out: undefined })
  await closeTroop(troop)
})

t.test('who is further behind is told where the others are, and gets nothing', async (t) => {
  const troop = await open('behind', BRIEF)
  const [zero, one, two] = troop
  for (const step of [1, 2]) {
    sendStep(troop, step, [0, 1])
    await Promise.all([receipts(zero), receipts(one)])
  }
  two[0]!.send(0, 1, SENT[2]![0]![0]!)
  t.match(await two[0]!.error(), { code: 'STEP_CONFLICT', expected_step: 3, left_out: undefined })
  // It takes weights from another replica, and goes on.
  sendStep(troop, 3, [0, 1, 2])
  t.match((await Promise.all(troop.map(receipts))).flat(), Array(6).fill({ step: 3, contributed: true }))
  await closeTroop(troop)
})

t.test('a lost replica is not waited for; back, it is where the others are', async (t) => {
  const troop = await open('lost', LONG)
  const [zero, one, two] = troop
  sendStep(troop, 1, [0, 1])
  two[1]!.send(1, 1, SENT[2]![0]![1]!)
  two[0]!.client.socket.terminate()
  for (const receipt of (await Promise.all([receipts(zero), receipts(one)])).flat())
    t.match(receipt, { contributors: contributors(0, 1) })
  t.same(service.runs.get('lost').intake.members.status.at(-2), { rank: 0, replica: 2, connected: false })
  await two[0]!.open({ groups: undefined, parameters: undefined })
  t.match(two[0]!.opened, { step: 1, resumed: true })
  send(two, 1, { gradients: SENT[2]![0]! })
  for (const mate of two) t.match(await mate.error(), { left_out: true, expected_step: 2 })
  t.match(await receipts(two), [{ contributed: false }, { contributed: false }])
  t.same(updatesOf(two, MODEL), updatesOf(zero, MODEL))
  sendStep(troop, 2, [2, 1, 0])
  t.match((await Promise.all(troop.map(receipts))).flat(), Array(6).fill({ contributors: contributors(0, 1, 2) }))
  await closeTroop(troop)
})

t.test('a contributor that is lost after the step was closed gets the same again', async (t) => {
  const troop = await open('cut', LONG)
  const [zero, , two] = troop
  sendStep(troop, 1, [0, 1, 2])
  await receipts(zero)
  const updates = updatesOf(zero, MODEL)
  two[1]!.client.socket.terminate()
  await two[1]!.open({ takeover: true, groups: undefined, parameters: undefined })
  for (const p of two[1]!.own) two[1]!.send(p, 1, SENT[2]![0]![p]!)
  two[1]!.end(1)
  t.match(await two[1]!.receipt(), { replayed: true, contributed: true })
  await two[0]!.receipt()
  t.same(updatesOf(two, MODEL), updates)
  t.equal(two[1]!.client.updates.get(0)!.replayed, true)
  two[1]!.send(0, 1, SENT[1]![0]![0]!)
  t.match(await two[1]!.error(), { code: 'STEP_CONFLICT', message: /another gradient of rank 1 of replica 2/ })
  await closeTroop(troop)
})

t.test('a quorum that does not come is lost: nothing is applied, and the ends may come again', async (t) => {
  const troop = await open('few', BRIEF)
  const [zero, one, two] = troop
  const before = await told(service, 'QUORUM_LOST')
  sendStep(troop, 1, [0])
  const error = {
    code: 'QUORUM_LOST',
    status: 503,
    retryable: true,
    step: 1,
    message:
      '1 replicas have ended step 1 within 0.02 seconds: of 3 that are connected more than half have to, and 2 at least; nothing was applied, send end again',
  }
  for (const mate of zero) t.match(await mate.error(), error)
  t.equal(await told(service, 'QUORUM_LOST'), before + 2)
  t.match(service.runs.get('few'), { step: 0, ahead: [] })
  t.same(service.runs.get('few').intake.ended, [])
  // The gradients are there still; with two of three that are connected it is enough.
  for (const mate of zero) mate.end(1)
  sendStep(troop, 1, [1])
  for (const receipt of (await Promise.all([receipts(zero), receipts(one)])).flat())
    t.match(receipt, { contributors: contributors(0, 1), applied: 5 })
  for (const mate of two) mate.end(1)
  for (const mate of two) t.match(await mate.error(), { left_out: true })
  await receipts(two)
  t.same(updatesOf(two, MODEL), updatesOf(one, MODEL))
  await closeTroop(troop)
})

t.test('more than half of the connected replicas have to come', async (t) => {
  const troop = await open('half', { min_replicas: 1, deadline_seconds: 0.02 })
  const [zero, one] = troop
  sendStep(troop, 1, [1])
  for (const mate of one) t.match(await mate.error(), { code: 'QUORUM_LOST', message: /^1 replicas .* 1 at least/ })
  for (const mate of zero) mate.client.socket.terminate()
  await until(() => service.runs.get('half').intake.members.connectedReplicas.length === 2)
  for (const mate of one) mate.end(1)
  for (const mate of one) t.match(await mate.error(), { code: 'QUORUM_LOST', message: /of 2 that are connected/ })
  for (const mate of troop[2]) mate.client.socket.terminate()
  await until(() => service.runs.get('half').intake.members.connectedReplicas.length === 1)
  for (const mate of one) mate.end(1)
  t.match(await receipts(one), Array(2).fill({ contributors: contributors(1) }))
  for (const { client } of one) await client.close()
})

t.test('without a quorum all are waited for', async (t) => {
  const troop = await open('all')
  const [zero, one, two] = troop
  t.equal(zero[0]!.opened.quorum, undefined)
  sendStep(troop, 1, [0, 1])
  await until(() => service.runs.get('all').intake.ended.length === 4)
  two[0]!.client.socket.terminate()
  await two[0]!.open({ takeover: true })
  sendStep(troop, 1, [2])
  t.match((await Promise.all([zero, one, two].map(receipts))).flat(), Array(6).fill({ applied: 5 }))
  await closeTroop(troop)
})
