import t from 'tap'
import { normal, RawClient, startService, turn, until } from '../service.js'
import { alone, byColumns, Crew, evenly, gradientsOf, Mate, MODEL } from './crew.js'

const STEPS = gradientsOf(MODEL, { seed: 21, steps: 4 })

t.test('a run goes on with other ranks and other ranges, and its bits do not change', async (t) => {
  const service = await startService()
  const expected = await alone(service.url, 'alone', { model: MODEL, steps: STEPS })
  const splits = [evenly(MODEL, 2), byColumns(MODEL, 2), evenly(MODEL, 3)]
  for (const [i, split] of splits.entries()) {
    const crew = await Crew.open(service.url, 'elastic', { model: MODEL, split })
    t.match(crew.mates[0]!.opened, { step: i, resumed: i > 0, ahead: [] })
    const { receipts, updates } = await crew.step(i + 1, STEPS[i]!)
    for (const { digest } of receipts) t.equal(digest, expected[i]!.receipt.digest)
    t.same(updates, expected[i]!.updates)
    await crew.close()
  }
  const client = await RawClient.connect(service.url)
  const opened = await client.open({ run: 'elastic' })
  t.match(opened, { step: 3, members: undefined, member: undefined })
  t.equal((await client.step(4, STEPS[3]!)).digest, expected[3]!.receipt.digest)
  await client.close()
  await service.app.close()
})

t.test('rank 0 may take the run over for a new layout while others are there; they are told, and let go', async (t) => {
  const service = await startService()
  const crew = await Crew.open(service.url, 'taken', { model: MODEL, split: evenly(MODEL, 3) })
  const { receipts } = await crew.step(1, STEPS[0]!)
  const smaller = evenly(MODEL, 2)
  const [zero, one] = [0, 1].map((rank) => new Mate(service.url, 'taken', { model: MODEL, split: smaller, rank })) as [
    Mate,
    Mate,
  ]
  await zero.open({ takeover: true })
  for (const { client } of crew.mates) t.match(await client.closed(), { code: 4409 })
  t.match(zero.opened, { digest: receipts[0]!.digest, step: 1, members: [{ connected: true }, { connected: false }] })
  await one.open()
  for (const mate of [zero, one]) {
    for (const parameter of mate.own) mate.send(parameter, 2, STEPS[1]![parameter]!)
    mate.end(2)
  }
  t.equal((await zero.receipt()).digest, (await one.receipt()).digest)
  // A connection that is to be the only one takes over from all of them.
  const sole = await RawClient.connect(service.url)
  t.match(await sole.open({ run: 'taken', takeover: true }), { step: 2, member: undefined })
  for (const mate of [zero, one]) t.match(await mate.client.closed(), { code: 4409 })
  await sole.close()
  await service.app.close()
})

t.test('a rank is taken over alone: the older connection gets 4409, the others hear of it', async (t) => {
  const service = await startService()
  const split = evenly(MODEL, 2)
  const crew = await Crew.open(service.url, 'fenced', { model: MODEL, split })
  const [zero, one] = crew.mates as [Mate, Mate]
  zero.send(0, 1, STEPS[0]![0]!)
  const older = one.client
  await one.open({ takeover: true })
  t.match(await older.closed(), { code: 4409 })
  t.match(one.opened, { epoch: 3, resumed: false })
  const told = [await zero.client.expect('members'), await zero.client.expect('members')]
  t.same(
    told.map(({ members }) => members),
    [[{ rank: 1, connected: true }], [{ rank: 1, connected: true }]],
  )
  one.client.socket.terminate()
  t.same((await zero.client.expect('members')).members, [{ rank: 1, connected: false }])
  await one.open()
  // An `end` goes with its connection.
  const { intake } = service.runs.get('fenced')
  one.send(0, 1, STEPS[0]![0]!)
  one.end(1, [1, 2, 3])
  await until(() => intake.ended.length === 1)
  await one.open({ takeover: true })
  t.same(intake.ended, [])
  zero.client.updates.clear()
  const { receipts } = await crew.step(1, STEPS[0]!)
  const [expected] = await alone(service.url, 'alone', { model: MODEL, steps: STEPS.slice(0, 1) })
  t.equal(receipts[0]!.digest, expected!.receipt.digest)
  await crew.close()
  await service.app.close()
})

t.test('after a restart members send the last step again, and it is put together and computed again', async (t) => {
  const data = t.testdir({ data: {} })
  const settings = { data, durability: 'journal' }
  const first = await startService(settings)
  const split = evenly(MODEL, 3)
  const crew = await Crew.open(first.url, 'kept', { model: MODEL, split })
  await crew.step(1, STEPS[0]!)
  const { receipts, updates } = await crew.step(2, STEPS[1]!)
  await crew.close()
  await first.drain()

  const second = await startService(settings)
  const again = await Crew.open(second.url, 'kept', { model: MODEL, split })
  t.match(again.mates[0]!.opened, { step: 2, digest: receipts[0]!.digest, resumed: true, ahead: [] })
  const replay = await again.step(2, STEPS[1]!)
  t.same(replay.updates, updates)
  for (const receipt of replay.receipts) t.match(receipt, { replayed: true, digest: receipts[0]!.digest })
  t.equal(again.mates[0]!.client.updates.get(0)!.replayed, true)
  // Once more, from what is kept now; and with other bytes.
  t.same((await again.step(2, STEPS[1]!)).updates, updates)
  const one = again.mates[1]!
  one.send(0, 2, STEPS[0]![0]!)
  t.match(await one.error(), { code: 'STEP_CONFLICT', message: /with another gradient of rank 1/, parameter: 0 })
  await again.close()
  await second.drain()
})

t.test('a step that cannot be put together any more is refused to those who wait for it', async (t) => {
  const data = t.testdir({ data: {} })
  const settings = { data, durability: 'journal' }
  const split = evenly(MODEL, 2)
  const first = await startService(settings)
  const crew = await Crew.open(first.url, 'behind', { model: MODEL, split })
  await crew.step(1, STEPS[0]!)
  await crew.close()
  await first.drain()
  const second = await startService(settings)
  const again = await Crew.open(second.url, 'behind', { model: MODEL, split })
  const [zero, one] = again.mates as [Mate, Mate]
  zero.send(0, 1, STEPS[0]![0]!)
  await until(() => zero.client.socket.bufferedAmount === 0)
  one.send(1, 2, STEPS[1]![1]!)
  const conflict = { code: 'STEP_CONFLICT', message: /a member has begun step 2/, parameter: 0, expected_step: 2 }
  t.match(await zero.error(), conflict)
  zero.send(1, 1, STEPS[0]![1]!)
  t.match(await zero.error(), { ...conflict, parameter: 1 })
  zero.send(0, 1, STEPS[0]![0]!)
  t.match(await zero.error(), conflict)
  await again.close()
  await second.drain()
})

t.test('a member that goes on in the middle of a step that is sent again leaves the others without it', async (t) => {
  const data = t.testdir({ data: {} })
  const settings = { data, durability: 'journal' }
  const split = evenly(MODEL, 3)
  const first = await startService(settings)
  const crew = await Crew.open(first.url, 'on', { model: MODEL, split })
  await crew.step(1, STEPS[0]!)
  await crew.close()
  await first.drain()
  const second = await startService(settings)
  const again = await Crew.open(second.url, 'on', { model: MODEL, split })
  const [zero, one] = again.mates as [Mate, Mate]
  zero.send(0, 1, STEPS[0]![0]!)
  await until(() => zero.client.socket.bufferedAmount === 0)
  one.send(0, 1, STEPS[0]![0]!)
  one.send(0, 2, STEPS[1]![0]!)
  t.match(await zero.error(), { code: 'STEP_CONFLICT', message: /a member has begun step 2/, parameter: 0 })
  await again.close()
  await second.drain()
})

t.test('max_logits are the largest of all members, and nothing is computed before all have begun', async (t) => {
  const service = await startService()
  const model = {
    groups: [{ name: 'g', algorithm: 'muonclip', lr: 0.01 }],
    parameters: ['query', 'key'].map((name) => ({ name, shape: [4, 6], group: 'g' })),
    attentions: [
      { name: 'h', threshold: 10, query_heads: 2, head_dim: 2, query: { parameter: 0 }, key: { parameter: 1 } },
    ],
  }
  const gradient = normal(5, 24)
  const sole = await RawClient.connect(service.url)
  await sole.open({ run: 'sole', ...model })
  sole.send({ type: 'step', step: 1, max_logits: { h: [40, 90] } })
  sole.gradient(0, 1, { values: gradient })
  sole.send({ type: 'end', step: 1, skipped: [1] })
  const expected = await sole.expect('receipt')

  const split = byColumns(model, 3)
  const crew = await Crew.open(service.url, 'clipped', { model, split })
  const [zero, one, two] = crew.mates as [Mate, Mate, Mate]
  one.client.send({ type: 'step', step: 1, max_logits: { h: [40, 3] } })
  for (const mate of crew.mates) if (mate !== two) mate.send(0, 1, gradient)
  // Rank 2 gives other logits on a connection that is lost before anything is applied: they do not count.
  two.client.send({ type: 'step', step: 1, max_logits: { h: [1000, 1] } })
  two.client.socket.terminate()
  await until(() => !service.runs.get('clipped').intake.members.status[2]!.connected)
  await two.open()
  two.send(0, 1, gradient)
  await until(() => [zero, one, two].every(({ client }) => client.updates.has(0)))
  two.client.send({ type: 'step', step: 1, max_logits: { h: [1, 90] } })
  t.match(await two.error(), { code: 'STEP_CONFLICT', message: /rank 2 has begun step 1 with other max_logits/ })
  for (const mate of crew.mates) mate.client.send({ type: 'step', step: 1 })
  await crew.close()

  const second = await Crew.open(service.url, 'larger', { model, split })
  const logits = [
    [1, 90],
    [40, 3],
    [2, 2],
  ]
  for (const [rank, mate] of second.mates.entries()) {
    mate.client.send({ type: 'step', step: 1, max_logits: { h: logits[rank]! } })
    mate.client.send({ type: 'step', step: 1, max_logits: { h: logits[rank]! } })
    mate.send(0, 1, gradient)
    mate.end(1, [1])
  }
  const receipts = await Promise.all(second.mates.map((mate) => mate.receipt()))
  for (const receipt of receipts) t.match(receipt, { digest: expected.digest, max_logit: 90, clipped_heads: { h: 2 } })
  // The rows of the skipped key are scaled for every member that has elements of it.
  for (const mate of second.mates) t.same(mate.client.updates.get(1)!.row_scale, sole.updates.get(1)!.row_scale)
  // Said again after its step, each has to say what it said.
  const [again] = second.mates as [Mate]
  again.client.send({ type: 'step', step: 1, max_logits: { h: [1, 90] } })
  again.client.send({ type: 'step', step: 1, max_logits: { h: [40, 90] } })
  t.match(await again.error(), { code: 'STEP_CONFLICT', message: /rank 0 has begun step 1 with other max_logits/ })
  await second.close()
  await sole.close()
  await service.app.close()
})

t.test('memory for the parts of members is granted at open, or the bytes are named and no run is left', async (t) => {
  const groups = [{ name: 'g', algorithm: 'sgd', lr: 1, momentum: 0.9 }]
  const parameters = [{ name: 'w', shape: [2 ** 18], group: 'g' }]
  // State, update and largest gradient take 3 MiB; the parts another MiB.
  const service = await startService({ state_bytes_limit: 3.5 * 2 ** 20 })
  const client = await RawClient.connect(service.url)
  const member = { rank: 0, world_size: 2 }
  const frame = { type: 'open', protocol: 1, run: 'large', groups, parameters, member } as const
  client.send(frame)
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message: /run 'large' with members needs 1048576 bytes of memory .*, \d+ are left/,
  })
  t.throws(() => service.runs.get('large'), { code: 'RUN_NOT_FOUND' })
  t.equal(service.device.admittedBytes, 0)
  t.match(await client.open({ run: 'large', groups, parameters }), { epoch: 1 })
  await client.close()
  const other = await RawClient.connect(service.url)
  other.send(frame)
  t.match(await other.expect('error'), { code: 'OVER_CAPACITY' })
  t.equal(service.runs.get('large').epoch, 1)
  await other.close()
  await service.app.close()
})

t.test('a member that is slow holds up the end of the step, and no other member’s sending', async (t) => {
  // The parts of one member alone are more than the staging arena has.
  const service = await startService({ staging_bytes: 2 ** 20 })
  const parameters = Array.from({ length: 8 }, (_, i) => ({ name: `p${i}`, shape: [1024, 512], group: 'g' }))
  const model = { groups: [{ name: 'g', algorithm: 'sgd', lr: 1 }], parameters }
  const crew = await Crew.open(service.url, 'slow', { model, split: evenly(model, 2) })
  const [zero, one] = crew.mates as [Mate, Mate]
  const gradient = normal(3, 1024 * 512)
  one.client.send({ type: 'step', step: 1 })
  one.send(0, 1, gradient)
  for (const parameter of zero.own) zero.send(parameter, 1, gradient)
  const received = async () => (await service.metrics.received_bytes_total.get()).values[0]!.value
  while ((await received()) < 9 * 2 ** 20) await turn()
  t.equal(service.device.staging.used, 0)
  zero.end(1)
  for (const parameter of one.own.slice(1)) one.send(parameter, 1, gradient)
  one.end(1)
  t.match(await Promise.all([zero.receipt(), one.receipt()]), [{ applied: 8 }, { applied: 8 }])
  await crew.close()
  await service.app.close()
})

t.test('REST, events and metrics tell who is there, and for whom the others wait', async (t) => {
  const service = await startService()
  const crew = await Crew.open(service.url, 'seen', { model: MODEL, split: evenly(MODEL, 2) })
  const [zero, one] = crew.mates as [Mate, Mate]
  const events = await fetch(`${service.http}/v1/runs/seen/events`)
  const reader = events.body!.pipeThrough(new TextDecoderStream()).getReader()
  const run = async () => (await (await fetch(`${service.http}/v1/runs/seen`)).json()) as { members?: unknown }
  zero.end(1, [0, 1, 2, 3, 4])
  await until(() => service.runs.get('seen').intake.ended.length === 1)
  t.same((await run()).members, [
    { rank: 0, connected: true, ended: true },
    { rank: 1, connected: true, ended: false },
  ])
  t.match(await service.metrics.registry.metrics(), /^muond_members 2$/m)
  one.client.socket.terminate()
  t.equal((await reader.read()).value, 'event: member\ndata: {"rank":1,"connected":false}\n\n')
  t.same((await run()).members, [
    { rank: 0, connected: true, ended: true },
    { rank: 1, connected: false, ended: false },
  ])
  await one.open()
  t.equal((await reader.read()).value, 'event: member\ndata: {"rank":1,"connected":true}\n\n')
  one.end(1, [0, 1, 2, 3])
  t.match(await Promise.all([zero.receipt(), one.receipt()]), [{ skipped: 5 }, { skipped: 5 }])
  const { values } = await service.metrics.member_wait_seconds_total.get()
  t.equal(values.find(({ labels }) => labels.rank === '0')!.value, 0)
  t.ok(values.find(({ labels }) => labels.rank === '1')!.value > 0)
  await crew.close()
  await service.app.close()
})

t.test('a member that is lost behind its end is missed, and its end with it', async (t) => {
  const service = await startService()
  const crew = await Crew.open(service.url, 'behind', { model: MODEL, split: evenly(MODEL, 2) })
  const [zero, one] = crew.mates as [Mate, Mate]
  const isTold = async () =>
    t.match(await one.client.expect('members'), { members: [{ rank: 0, connected: false }] }, 'the other is told')
  for (const parameter of zero.own) zero.send(parameter, 1, STEPS[0]![parameter]!)
  zero.end(1)
  await zero.client.close()
  await isTold()
  await zero.open({ groups: undefined, parameters: undefined })
  t.match(await one.client.expect('members'), { members: [{ rank: 0, connected: true }] })
  zero.end(1, [0, 1, 2, 3, 4])
  await until(() => service.runs.get('behind').intake.ended.length === 1)
  zero.client.socket.terminate()
  await isTold()
  t.same(service.runs.get('behind').intake.ended, [])
  await zero.open({ takeover: true, groups: undefined, parameters: undefined })
  const { receipts } = await crew.step(1, STEPS[0]!)
  t.match(receipts, [{ applied: 5 }, { applied: 5 }])
  await crew.close()
  await service.app.close()
})

t.test('a run goes back to a checkpoint by the first member that opens it', async (t) => {
  const service = await startService({ data: t.testdir({ data: {} }) })
  const split = evenly(MODEL, 2)
  const crew = await Crew.open(service.url, 'back', { model: MODEL, split })
  await crew.step(1, STEPS[0]!)
  crew.mates[0]!.client.send({ type: 'checkpoint', tag: 'one' })
  const { digest } = await crew.mates[0]!.client.expect('checkpointed')
  await crew.step(2, STEPS[1]!)
  await crew.close()
  const [zero, one] = crew.mates as [Mate, Mate]
  await until(() => !service.runs.get('back').connected)
  const back = { mode: 'resume', checkpoint: 'one', groups: undefined } as const
  await zero.open(back)
  t.match(zero.opened, { step: 1, digest })
  const late = await RawClient.connect(service.url)
  late.send({ ...one.frame, ...back })
  t.match(await late.expect('error'), { code: 'RUN_BUSY', message: /other members have run 'back'/ })
  await late.close()
  await one.open({ groups: undefined })
  const { receipts } = await crew.step(2, STEPS[2]!)
  t.match(receipts, [{ step: 2 }, { step: 2, digest: receipts[0]!.digest }])
  await crew.close()
  await service.app.close()
})
