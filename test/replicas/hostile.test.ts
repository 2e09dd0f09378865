import t from 'tap'
import type { OpenFrame } from '../../src/wire/frame.js'
import { evenly, gradientsOf, type Mate, MODEL, type Model } from '../members/crew.js'
import { normal, RawClient, startService, until } from '../service.js'
import { closeTroop, openTroop, receipts, send, troopOf, updatesOf } from './troop.js'

const service = await startService()
t.teardown(() => service.app.close())
const SPLIT = evenly(MODEL, 2)
const SENT = [0, 1].map((replica) => gradientsOf(MODEL, { seed: 40 + 50 * replica, steps: 2 }))
const open = (run: string, model = MODEL) =>
  openTroop(service.url, run, { model, split: evenly(model, 2), replicas: 2 }) as Promise<[Mate[], Mate[]]>

const REFUSED: [string, Pick<OpenFrame, 'member' | 'quorum'>, RegExp][] = [
  ['no replica', { member: { rank: 0, world_size: 1, replicas: 0 } }, /member\.replicas is 0, expected 1 to 1024/],
  [
    'a replica beyond',
    { member: { rank: 0, world_size: 1, replica: 2, replicas: 2 } },
    /member\.replica is 2, expected less than replicas, 2/,
  ],
  [
    'too many members',
    { member: { rank: 0, world_size: 64, replicas: 32 } },
    /member\.world_size 64 times member\.replicas 32 is 2048 members, expected at most 1024/,
  ],
  ['a quorum of nobody', { quorum: { min_replicas: 1, deadline_seconds: 1 } }, /quorum is of a run with replicas/],
  [
    'a quorum of none',
    { member: { rank: 0, world_size: 1, replicas: 2 }, quorum: { min_replicas: 0, deadline_seconds: 1 } },
    /quorum\.min_replicas is 0, expected 1 to member\.replicas, 2/,
  ],
  [
    'a quorum of more than there are',
    { member: { rank: 0, world_size: 1, replicas: 2 }, quorum: { min_replicas: 3, deadline_seconds: 1 } },
    /quorum\.min_replicas is 3, expected 1 to member\.replicas, 2/,
  ],
  ...[0, -1, Number.NaN, Number.POSITIVE_INFINITY, 1e9].map((deadline_seconds): (typeof REFUSED)[number] => [
    `a deadline of ${deadline_seconds}`,
    { member: { rank: 0, world_size: 1, replicas: 2 }, quorum: { min_replicas: 1, deadline_seconds } },
    /quorum\.deadline_seconds is .*, expected more than 0 and at most 86400/,
  ]),
]
for (const [what, keys, message] of REFUSED) {
  t.test(`${what} is refused with its numbers, and leaves no run behind`, async (t) => {
    const client = await RawClient.connect(service.url)
    client.send({ type: 'open', protocol: 1, run: 'refused', ...MODEL, ...keys })
    t.match(await client.expect('error'), { code: 'PARAMETER_INVALID', message })
    t.throws(() => service.runs.get('refused'), { code: 'RUN_NOT_FOUND' })
    await client.close()
  })
}

t.test('all members give the same replicas and the same quorum', async (t) => {
  const quorum = { min_replicas: 1, deadline_seconds: 5 }
  const troop = troopOf(service.url, 'same', { model: MODEL, split: SPLIT, replicas: 2, quorum })
  const [first, second] = troop.flat() as [Mate, Mate]
  await first.open()
  const client = await RawClient.connect(service.url)
  const refused = async (keys: Partial<OpenFrame>, message: RegExp, code = 'RUN_MISMATCH') => {
    client.send({ ...second.frame, ...keys })
    t.match(await client.expect('error'), { code, message })
  }
  await refused(
    { member: { rank: 1, world_size: 2, replicas: 3 } },
    /has 1 connections of 4 members in 2 replicas, world_size 2, replicas 3 given/,
  )
  await refused(
    { member: { rank: 1, world_size: 2 }, quorum: undefined },
    /has 1 connections of 4 members in 2 replicas, world_size 2, replicas 1 given/,
  )
  await refused(
    { quorum: { min_replicas: 2, deadline_seconds: 5 } },
    /quorum is 1 replicas after 5 seconds in this run, 2 replicas after 5 seconds given/,
  )
  await refused({ member: first.frame.member! }, /rank 0 of replica 0 of run 'same' has a connection/, 'RUN_BUSY')
  t.match(await client.open({ ...second.frame, quorum: undefined }), { quorum })
  await client.close()
  await first.client.close()
  // The quorum is that of the layout, which whoever comes first may go on with.
  await until(() => !service.runs.get('same').connected)
  await first.open({ quorum: undefined })
  t.match(first.opened, { quorum })
  await first.client.close()
  await until(() => !service.runs.get('same').connected)
  const [one] = troopOf(service.url, 'same', { model: MODEL, split: SPLIT, replicas: 3 }).flat() as [Mate]
  await one.open()
  t.equal(one.opened.quorum, undefined)
  const other = await RawClient.connect(service.url)
  other.send({ ...one.frame, member: { rank: 1, world_size: 2, replica: 2, replicas: 3 }, quorum })
  t.match(await other.expect('error'), { code: 'RUN_MISMATCH', message: /quorum is all replicas in this run/ })
  await other.close()
  await one.client.close()
})

t.test('NaN is refused to the replica that sends it, by rank and replica, and to no other', async (t) => {
  const [zero, one] = await open('nan')
  send(zero, 1, { gradients: SENT[0]![0]! })
  const bad = Float32Array.from(SENT[1]![0]![0]!)
  bad[40] = Number.NaN
  for (const mate of one) for (const p of mate.own) mate.send(p, 1, p === 0 ? bad : SENT[1]![0]![p]!)
  // Rank 0 has ended before its gradient is whole, or while it is looked at: its `end` is taken back.
  one[0]!.end(1)
  for (const mate of one) {
    t.match(await mate.error(), {
      code: 'GRADIENT_NOT_FINITE',
      parameter: 0,
      message: /'square' for step 1 holds NaN or Inf; NaN or Inf was sent by rank 1 of replica 1$/,
    })
  }
  t.match(await one[0]!.error(), { code: 'STEP_INCOMPLETE', message: /'square'/ })
  t.match(service.runs.get('nan'), { step: 0, ahead: [] })
  for (const mate of one) {
    mate.send(0, 1, SENT[1]![0]![0]!)
    mate.end(1)
  }
  t.match((await Promise.all([zero, one].map(receipts))).flat(), Array(4).fill({ applied: 5 }))
  t.same(updatesOf(one, MODEL), updatesOf(zero, MODEL))
  await closeTroop([zero, one])
})

t.test('a mean whose next state is not finite is refused to all, and what was applied stays', async (t) => {
  const model: Model = {
    groups: [
      { name: 'a', algorithm: 'adamw', lr: 0.1 },
      { name: 's', algorithm: 'sgd', lr: 0.1 },
    ],
    parameters: [
      { name: 'huge', shape: [4, 2], group: 'a' },
      { name: 'fine', shape: [4], group: 's' },
    ],
  }
  const [zero, one] = await open('overflow', model)
  const huge = new Float32Array(8).fill(3e38)
  for (const replica of [zero, one]) send(replica, 1, { gradients: [huge, normal(2, 4)] })
  for (const mate of [...zero, ...one]) {
    t.match(await mate.error(), { code: 'GRADIENT_NOT_FINITE', parameter: 0 })
    t.match(await mate.error(), { code: 'STEP_INCOMPLETE', message: /'huge'/ })
  }
  t.same(service.runs.get('overflow').ahead, [1])
  // A contributor may not change its weight in the middle of the step.
  one[1]!.end(1, [0], 2)
  t.match(await one[1]!.error(), {
    code: 'STEP_CONFLICT',
    message: 'rank 1 of replica 1 ends step 1 with weight 2, and it has with 1',
  })
  for (const mate of [...one, ...zero]) mate.end(1, [0])
  t.match((await Promise.all([zero, one].map(receipts))).flat(), Array(4).fill({ applied: 1, skipped: 1 }))
  t.same(one[0]!.client.updates.get(1)!.data, zero[0]!.client.updates.get(1)!.data)
  await closeTroop([zero, one])
})

t.test('what no replica may apply is forgotten, and the step goes on with what comes', async (t) => {
  const model: Model = {
    groups: [{ name: 'a', algorithm: 'adamw', lr: 0.1 }],
    parameters: [{ name: 'w', shape: [2, 2], group: 'a' }],
  }
  const [zero, one] = await open('again', model)
  for (const replica of [zero, one]) send(replica, 1, { gradients: [new Float32Array(4).fill(3e38)], weight: 1 })
  for (const mate of [...zero, ...one]) {
    t.match(await mate.error(), { code: 'GRADIENT_NOT_FINITE', parameter: 0 })
    t.match(await mate.error(), { code: 'STEP_INCOMPLETE' })
  }
  for (const replica of [zero, one]) send(replica, 1, { gradients: [normal(1, 4)], weight: 2 })
  t.match((await Promise.all([zero, one].map(receipts))).flat(), [
    ...Array(4).fill({ applied: 1, contributors: [{ weight: 2 }, { weight: 2 }] }),
  ])
  await closeTroop([zero, one])
})

t.test('weights are numbers above 0, the same for all ranks of a replica', async (t) => {
  const [zero, one] = await open('weights')
  const all = MODEL.parameters.map((_, i) => i)
  for (const weight of [0, -1, Number.NaN, Number.POSITIVE_INFINITY, 1e301]) {
    zero[0]!.end(1, all, weight)
    t.match(await zero[0]!.error(), {
      code: 'HYPERPARAMETER_INVALID',
      message: `weight of rank 0 of replica 0 is ${weight}, expected a number above 0 and at most 1e+300`,
    })
  }
  zero[0]!.end(1, all, 3)
  await until(() => service.runs.get('weights').intake.ended.length === 1)
  zero[1]!.end(1, all)
  t.match(await zero[1]!.error(), {
    code: 'STEP_CONFLICT',
    message: 'rank 1 of replica 0 ends step 1 with weight 1, and rank 0 has with 3',
  })
  zero[1]!.end(1, all, 3)
  for (const mate of one) mate.end(1, all, 2)
  const got = (await Promise.all([zero, one].map(receipts))).flat()
  t.match(got, Array(4).fill({ contributors: [{ weight: 3 }, { weight: 2 }], applied: 0 }))
  await closeTroop([zero, one])
})

t.test('a replica that sends what another one skips is refused, and both are named', async (t) => {
  const [zero, one] = await open('mixture')
  send(zero, 1, { gradients: SENT[0]![0]! })
  for (const mate of one) for (const p of mate.own) if (p !== 3) mate.send(p, 1, SENT[1]![0]![p]!)
  one[0]!.end(1, [3])
  await until(() => service.runs.get('mixture').intake.ended.length === 3)
  one[1]!.end(1, [3])
  t.match(await one[1]!.error(), {
    code: 'STEP_CONFLICT',
    parameter: 3,
    message: "parameter 'bias' is sent by replica 0 and skipped by replica 1 in step 1: all have to do the same",
  })
  // The other way around: whoever is last is refused.
  zero[0]!.client.socket.terminate()
  await zero[0]!.open({ takeover: true })
  one[1]!.end(1, [3])
  await until(() => service.runs.get('mixture').intake.ended.length === 3)
  for (const p of zero[0]!.own) zero[0]!.send(p, 1, SENT[0]![0]![p]!)
  zero[0]!.end(1)
  t.match(await zero[0]!.error(), { code: 'STEP_CONFLICT', message: /is sent by replica 0 and skipped by replica 1/ })
  // A member is not read behind its `end`.
  for (const { client } of [...zero, ...one]) client.socket.terminate()
})

t.test('a member ends what it has sent or skips, and nothing else', async (t) => {
  const [zero, one] = await open('lacks')
  zero[0]!.send(0, 1, SENT[0]![0]![0]!)
  zero[0]!.end(1, [1, 2, 3])
  t.match(await zero[0]!.error(), { code: 'STEP_INCOMPLETE', message: /'scalar'$/ })
  for (const mate of [...zero, ...one]) mate.end(1, [0, 1, 2, 3, 4])
  t.match((await Promise.all([zero, one].map(receipts))).flat(), Array(4).fill({ skipped: 5, contributed: true }))
  await closeTroop([zero, one])
})

t.test('hyperparameters are given by the rank 0 of any replica, and no two may differ', async (t) => {
  const [zero, one] = await open('values')
  const lr = (value: number) => ({ m: { lr: value } })
  one[0]!.client.send({ type: 'step', step: 1, groups: lr(0.5) })
  await until(() => service.runs.get('values').groups.get('m')?.hyperparameters.lr === 0.5)
  zero[0]!.client.send({ type: 'step', step: 1, groups: lr(0.25) })
  t.match(await zero[0]!.error(), { code: 'STEP_CONFLICT', message: /other values .* of rank 0 of replica 0$/ })
  zero[1]!.client.send({ type: 'step', step: 1, groups: lr(0.5) })
  t.match(await zero[1]!.error(), { message: /rank 1 of replica 0 gives values of step 1 before rank 0 has begun it/ })
  // What a member says that is lost before the step is closed was never said.
  one[0]!.client.socket.terminate()
  await until(() => service.runs.get('values').groups.get('m')?.hyperparameters.lr === 0.02)
  await one[0]!.open()
  zero[0]!.client.send({ type: 'step', step: 1, groups: lr(0.25) })
  zero[1]!.client.send({ type: 'step', step: 1 })
  for (const [r, replica] of [zero, one].entries()) send(replica, 1, { gradients: SENT[r]![0]! })
  t.match((await Promise.all([zero, one].map(receipts))).flat(), Array(4).fill({ groups: { m: { lr: 0.25 } } }))
  await closeTroop([zero, one])
})

t.test('max_logits are the largest of the contributors', async (t) => {
  const model: Model = {
    groups: [{ name: 'g', algorithm: 'muonclip', lr: 0.01 }],
    parameters: ['query', 'key'].map((name) => ({ name, shape: [4, 6], group: 'g' })),
    attentions: [
      { name: 'h', threshold: 10, query_heads: 2, head_dim: 2, query: { parameter: 0 }, key: { parameter: 1 } },
    ],
  }
  const quorum = { min_replicas: 2, deadline_seconds: 3600 }
  const troop = await openTroop(service.url, 'clip', { model, split: evenly(model, 2), replicas: 3, quorum })
  const logits = [
    [40, 3],
    [2, 90],
    [1000, 1000],
  ]
  for (const [r, replica] of troop.entries())
    for (const mate of replica) mate.client.send({ type: 'step', step: 1, max_logits: { h: logits[r]! } })
  await until(() => service.runs.get('clip').groups.size === 1)
  for (const replica of troop.slice(0, 2)) {
    for (const mate of replica) {
      mate.send(0, 1, normal(3, 24))
      mate.end(1, [1])
    }
  }
  await until(() => service.runs.get('clip').intake.ended.length === 4)
  // What a lost member has said is forgotten; that of its replica, which is left out, does not count.
  troop[2]![0]!.client.socket.terminate()
  const got = (await Promise.all(troop.slice(0, 2).map(receipts))).flat()
  t.match(got, Array(4).fill({ max_logit: 90, clipped_heads: { h: 2 } }))
  troop[2]![1]!.end(1)
  t.match(await troop[2]![1]!.error(), { left_out: true })
  t.match(await troop[2]![1]!.receipt(), { contributed: false })
  const scale = troop[2]![1]!.client.updates.get(1)!.row_scale
  t.same(scale, troop[0]![1]!.client.updates.get(1)!.row_scale)
  t.same(troop[2]![1]!.client.updates.get(0)!.data, troop[0]![1]!.client.updates.get(0)!.data)
  for (const { client } of troop.flat()) client.socket.terminate()
})

t.test('a replica that begins with other weights is refused, and told what to do', async (t) => {
  const troop = troopOf(service.url, 'digests', { model: MODEL, split: SPLIT, replicas: 2 })
  const [[zero, one], [other, last]] = troop as [[Mate, Mate], [Mate, Mate]]
  await zero.open({ weights: 'aa' })
  await one.open({ weights: 'bb' })
  const client = await RawClient.connect(service.url)
  client.send({ ...other.frame, weights: 'cc' })
  const message =
    /replica 1 begins with other weights than replica 0: at rank 0 their digests are cc and aa; give all replicas the same/
  t.match(await client.expect('error'), { code: 'RUN_MISMATCH', message })
  await client.close()
  await other.open({ weights: 'aa' })
  await last.open()
  await zero.open({ takeover: true, weights: 'aa' })
  for (const replica of troop) send(replica, 1, { gradients: SENT[0]![0]! })
  await receipts(troop.flat())
  // The weights have moved: what is said of them now is not of the same step.
  await other.open({ takeover: true, weights: 'dd' })
  await closeTroop(troop)
})

t.test('the weights of a replica that has left count no more', async (t) => {
  const troop = troopOf(service.url, 'left', { model: MODEL, split: evenly(MODEL, 1), replicas: 3 })
  const [[first], [second], [third]] = troop as [[Mate], [Mate], [Mate]]
  await first.open({ weights: 'aa' })
  await second.open()
  await first.close()
  t.match(await second.client.expect('members'), { members: [{ replica: 0, connected: false }] })
  await third.open({ weights: 'bb' })
  await second.close()
  await third.close()
})

t.test('weights are those of a member', async (t) => {
  const client = await RawClient.connect(service.url)
  client.send({ type: 'open', protocol: 1, run: 'alone', ...MODEL, weights: 'aa' })
  t.match(await client.expect('error'), { code: 'PARAMETER_INVALID', message: /give member as well/ })
  await client.close()
})
