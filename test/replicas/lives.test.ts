import t from 'tap'
import { ServiceError } from '../../src/errors.js'
import { evenly, gradientsOf, type Mate, MODEL } from '../members/crew.js'
import { RawClient, startService, until } from '../service.js'
import { meanOf } from './oracle.js'
import { closeTroop, openTroop, receipts, send, updatesOf } from './troop.js'

const SPLIT = evenly(MODEL, 2)
const SENT = [0, 1, 2].map((replica) => gradientsOf(MODEL, { seed: 700 + 50 * replica, steps: 3 }))
const QUORUM = { min_replicas: 2, deadline_seconds: 3600 }
const sendStep = (troop: Mate[][], step: number, which: readonly number[]) => {
  for (const r of which) send(troop[r]!, step, { gradients: SENT[r]![step - 1]!, weight: r + 1 })
}

for (const durability of ['journal', 'checkpoint'] as const) {
  t.test(
    `after a restart a run with replicas is where it was, and goes on as if it had not stopped (${durability})`,
    async (t) => {
      const undisturbed = await startService()
      const expected = await openTroop(undisturbed.url, 'run', { model: MODEL, split: SPLIT, replicas: 2 })
      const digests: string[] = []
      for (const step of [1, 2, 3]) {
        sendStep(expected, step, [0, 1])
        digests.push((await receipts(expected.flat()))[0]!.digest)
      }
      const settings = { data: t.testdir({ data: {} }), durability }
      const first = await startService(settings)
      const troop = await openTroop(first.url, 'run', { model: MODEL, split: SPLIT, replicas: 2 })
      for (const step of [1, 2]) {
        sendStep(troop, step, [0, 1])
        await receipts(troop.flat())
      }
      const updates = updatesOf(troop[0]!, MODEL)
      await closeTroop(troop)
      await first.drain()

      const second = await startService(settings)
      const again = await openTroop(second.url, 'run', { model: MODEL, split: SPLIT, replicas: 2 })
      t.match(again[0]![0]!.opened, { step: 2, digest: digests[1], resumed: true })
      const rows = (await (await fetch(`${second.http}/v1/runs/run/receipts`)).json()) as {
        receipts: { contributors: unknown }[]
      }
      t.same(rows.receipts.at(-1)!.contributors, [
        { replica: 0, weight: 1 },
        { replica: 1, weight: 2 },
      ])
      // The last step sent again is put together and computed again; and then once more, from what is kept.
      for (const _ of [1, 2]) {
        sendStep(again, 2, [1, 0])
        for (const receipt of await receipts(again.flat()))
          t.match(receipt, { replayed: true, digest: digests[1], contributed: true })
        for (const replica of again) t.same(updatesOf(replica, MODEL), updates)
      }
      sendStep(again, 3, [0, 1])
      t.equal((await receipts(again.flat()))[0]!.digest, digests[2])
      await closeTroop(again)
      await closeTroop(expected)
      await second.drain()
      await undisturbed.app.close()
    },
  )
}

t.test('after a restart what was sent otherwise, and what cannot be put together, is refused', async (t) => {
  const settings = { data: t.testdir({ data: {} }), durability: 'journal' }
  const first = await startService(settings)
  const troop = await openTroop(first.url, 'run', { model: MODEL, split: SPLIT, replicas: 3, quorum: QUORUM })
  troop[2]![0]!.client.socket.terminate()
  await until(() => first.runs.get('run').intake.members.connectedReplicas.length === 2)
  sendStep(troop, 1, [0, 1])
  const updated = troop.slice(0, 2).flat()
  await receipts(updated)
  for (const { client } of troop.flat()) client.socket.terminate()
  await until(() => !first.runs.get('run').connected)
  await first.drain()

  const second = await startService(settings)
  const again = await openTroop(second.url, 'run', { model: MODEL, split: SPLIT, replicas: 3, quorum: QUORUM })
  const [[zero], [one, other], [two]] = again as [[Mate], [Mate, Mate], [Mate]]
  // Of what it has missed nothing is kept: it is told so, and nothing follows.
  two.send(0, 1, SENT[2]![0]![0]!)
  t.match(await two.error(), {
    code: 'STEP_CONFLICT',
    left_out: undefined,
    expected_step: 2,
    message: /closed without replica 2, and its updates are not there any more: take weights from another replica/,
  })
  for (const mate of [one, other]) mate.send(0, 1, SENT[2]![0]![0]!)
  for (const mate of [one, other])
    t.match(await mate.error(), { code: 'STEP_CONFLICT', message: /with another gradient of replica 1$/ })
  // Replica 1 waits for replica 0, a rank of which has begun the next step.
  for (const mate of [one, other]) mate.send(0, 1, SENT[1]![0]![0]!)
  zero.client.send({ type: 'step', step: 2 })
  const passed = { code: 'STEP_CONFLICT', message: /a member has begun step 2/, parameter: 0, expected_step: 2 }
  for (const mate of [one, other]) t.match(await mate.error(), passed)
  for (const mate of [one, other]) mate.send(1, 1, SENT[1]![0]![1]!)
  for (const mate of [one, other]) t.match(await mate.error(), { ...passed, parameter: 1 })
  for (const { client } of again.flat()) client.socket.terminate()
  await second.drain()
})

t.test('a run goes on with another number of replicas, and with one member', async (t) => {
  const service = await startService()
  const means = [0, 1, 2].map((s) =>
    MODEL.parameters.map((_, p) => meanOf(SENT.map((each) => ({ values: each[s]![p]!, weight: 1 })))),
  )
  const expected = await RawClient.connect(service.url)
  await expected.open({ run: 'sole', ...MODEL })
  const state = async (run: string) => {
    const body = Buffer.from(await (await fetch(`${service.http}/v1/runs/${run}/state`)).arrayBuffer())
    return body.subarray(8 + Number(body.readBigUInt64LE()))
  }
  const three = await openTroop(service.url, 'elastic', { model: MODEL, split: SPLIT, replicas: 3 })
  for (const [r, replica] of three.entries()) send(replica, 1, { gradients: SENT[r]![0]! })
  await receipts(three.flat())
  await expected.step(1, means[0]!)
  t.same(await state('elastic'), await state('sole'))
  const all = service.device.admittedBytes
  // Rank 0 of replica 0 speaks for another layout; nobody else does.
  const other = await RawClient.connect(service.url)
  const place = (keys: { rank: number; replica: number }) => ({ member: { world_size: 1, replicas: 2, ...keys } })
  other.send({ type: 'open', protocol: 1, run: 'elastic', takeover: true, ...place({ rank: 0, replica: 1 }) })
  t.match(await other.expect('error'), { code: 'RUN_MISMATCH' })
  await other.close()
  const two = await openTroop(service.url, 'elastic-2', { model: MODEL, split: evenly(MODEL, 1), replicas: 2 })
  await closeTroop(two)
  for (const { client } of three.flat()) client.socket.terminate()
  await until(() => !service.runs.get('elastic').connected)
  const pair = await openTroop(service.url, 'elastic', { model: MODEL, split: evenly(MODEL, 1), replicas: 2 })
  t.ok(service.device.admittedBytes < all + two.length * all)
  // The last step was the mean of a replica that is not any more.
  for (const replica of pair) send(replica, 1, { gradients: SENT[0]![0]! })
  t.match(await pair[0]![0]!.error(), { code: 'STEP_CONFLICT' })
  for (const { client } of pair.flat()) client.socket.terminate()
  await until(() => !service.runs.get('elastic').connected)
  const sole = await RawClient.connect(service.url)
  t.match(await sole.open({ run: 'elastic' }), { step: 1 })
  await sole.step(2, means[1]!)
  await expected.step(2, means[1]!)
  t.same(await state('elastic'), await state('sole'))
  await sole.close()
  // The last step had no replicas: none can have been part of it.
  await until(() => !service.runs.get('elastic').connected)
  const late = await openTroop(service.url, 'elastic', { model: MODEL, split: evenly(MODEL, 1), replicas: 2 })
  late[0]![0]!.send(0, 2, means[1]![0]!)
  t.match(await late[0]![0]!.error(), { code: 'STEP_CONFLICT', left_out: undefined, expected_step: 3 })
  await closeTroop(late)
  await expected.close()
  await service.app.close()
})

t.test('memory for each replica and for the mean is granted at open, and given back', async (t) => {
  const groups = [{ name: 'g', algorithm: 'sgd', lr: 1, momentum: 0.9 }]
  const parameters = [{ name: 'w', shape: [2 ** 18], group: 'g', gradient_dtype: 'bfloat16' }]
  // State, update and largest gradient take 2.5 MiB; a replica's gradients half a MiB, and their mean a whole one.
  const service = await startService({ state_bytes_limit: 5 * 2 ** 20 })
  const client = await RawClient.connect(service.url)
  const frame = (replicas: number) => {
    return {
      type: 'open',
      protocol: 1,
      run: 'r',
      groups,
      parameters,
      member: { rank: 0, world_size: 1, replicas },
    } as const
  }
  client.send(frame(4))
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message: /run 'r' with members needs 1048576 bytes of memory/,
  })
  t.equal(service.device.admittedBytes, 0)
  await client.open(frame(3))
  const three = service.device.admittedBytes
  client.socket.terminate()
  await until(() => !service.runs.get('r').connected)
  const again = await RawClient.connect(service.url)
  again.send(frame(4))
  t.match(await again.expect('error'), { code: 'OVER_CAPACITY' })
  t.equal(service.device.admittedBytes, three)
  await again.open(frame(2))
  t.equal(service.device.admittedBytes, three - 2 ** 19)
  again.socket.terminate()
  await until(() => !service.runs.get('r').connected)
  const one = await RawClient.connect(service.url)
  await one.open(frame(1))
  t.equal(service.device.admittedBytes, three - 2 ** 20 - 2 ** 20)
  await one.close()
  await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })
  t.equal(service.device.admittedBytes, 0)
  await service.app.close()
})

t.test('a step that the journal cannot have is not finished, and may be ended again', async (t) => {
  const service = await startService({ data: t.testdir({ data: {} }), durability: 'journal' })
  const troop = await openTroop(service.url, 'full', { model: MODEL, split: SPLIT, replicas: 2 })
  const { journal } = service.runs.get('full')
  const commit = journal!.commit.bind(journal!)
  journal!.commit = async () => {
    journal!.commit = commit
    throw new ServiceError('STORAGE_FAILED', 'no room', { step: 1 })
  }
  sendStep(troop, 1, [0, 1])
  for (const mate of troop.flat()) t.match(await mate.error(), { code: 'STORAGE_FAILED' })
  t.match(service.runs.get('full'), { step: 0, ahead: [0, 1, 2, 3, 4] })
  // One of them sends all of it again, as it is used to.
  sendStep(troop, 1, [1])
  for (const mate of troop[0]!) mate.end(1)
  t.match(await receipts(troop.flat()), Array(4).fill({ step: 1, durable: true, applied: 5 }))
  t.same(updatesOf(troop[0]!, MODEL), updatesOf(troop[1]!, MODEL))
  await closeTroop(troop)
  await service.app.close()
})

t.test('REST, events and metrics tell the replicas apart', async (t) => {
  const service = await startService()
  const troop = await openTroop(service.url, 'seen', { model: MODEL, split: SPLIT, replicas: 2 })
  const events = await fetch(`${service.http}/v1/runs/seen/events`)
  const reader = events.body!.pipeThrough(new TextDecoderStream()).getReader()
  troop[1]![0]!.end(1, [0, 1, 2, 3, 4])
  await until(() => service.runs.get('seen').intake.ended.length === 1)
  const { members } = (await (await fetch(`${service.http}/v1/runs/seen`)).json()) as { members: unknown }
  t.same(members, [
    { rank: 0, replica: 0, connected: true, ended: false },
    { rank: 1, replica: 0, connected: true, ended: false },
    { rank: 0, replica: 1, connected: true, ended: true },
    { rank: 1, replica: 1, connected: true, ended: false },
  ])
  troop[0]![1]!.client.socket.terminate()
  t.equal((await reader.read()).value, 'event: member\ndata: {"rank":1,"replica":0,"connected":false}\n\n')
  await troop[0]![1]!.open()
  await reader.read()
  for (const mate of troop.flat()) if (mate !== troop[1]![0]) mate.end(1, [0, 1, 2, 3, 4])
  await receipts(troop.flat())
  t.match((await reader.read()).value, /"contributors":\[{"replica":0,"weight":1},{"replica":1,"weight":1}\]/)
  const { values } = await service.metrics.member_wait_seconds_total.get()
  t.equal(values.find(({ labels }) => labels.replica === '1' && labels.rank === '0')!.value, 0)
  await closeTroop(troop)
  await service.app.close()
})

t.test('a member that is left out and lost takes its updates with it', async (t) => {
  const service = await startService()
  const quorum = { min_replicas: 1, deadline_seconds: 3600 }
  const troop = await openTroop(service.url, 'gone', { model: MODEL, split: evenly(MODEL, 1), replicas: 2, quorum })
  const [[zero], [one]] = troop as [[Mate], [Mate]]
  one.client.socket.terminate()
  await until(() => service.runs.get('gone').intake.members.connectedReplicas.length === 1)
  sendStep(troop, 1, [0])
  await zero.receipt()
  await one.open()
  one.send(0, 1, SENT[1]![0]![0]!)
  t.match(await one.error(), { left_out: true })
  one.client.socket.terminate()
  await until(() => service.runs.get('gone').intake.members.connectedReplicas.length === 1)
  await one.open()
  one.end(1)
  t.match(await one.error(), { left_out: true })
  t.match(await one.receipt(), { contributed: false })
  await closeTroop(troop)
  await service.app.close()
})
