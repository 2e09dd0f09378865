import { once } from 'node:events'
import t, { type Test } from 'tap'
import type { OpenFrame, PlacedFrame } from '../../src/wire/frame.js'
import { RawClient } from '../service.js'
import { type Process, startCluster } from './service.js'

// Votes that come late, or not at all before the head or the shard begins again.

const MODEL: Omit<OpenFrame, 'type' | 'protocol' | 'run'> = {
  groups: [{ name: 'all', algorithm: 'adamw', lr: 0.5 }],
  parameters: [
    { name: 'a', shape: [2], group: 'all' },
    { name: 'b', shape: [2], group: 'all' },
  ],
}
const GRADIENT = Float32Array.of(1, 2)

async function clientOf(t: Test, url: string): Promise<RawClient> {
  const client = await RawClient.connect(url)
  t.teardown(() => client.socket.terminate())
  return client
}

/** A whole at its head, and the process that is not. */
type Placed = { control: RawClient; placed: PlacedFrame; head: Process; other: Process }

async function place(t: Test, [one, other]: readonly Process[]): Promise<Placed> {
  const control = await clientOf(t, `${one!.url}/v1/stream`)
  control.send({ type: 'open', protocol: 1, run: 'gpt', shards: 2, ...MODEL })
  const answer = await control.next()
  if (answer.type === 'moved') return place(t, [other!, one!])
  t.equal(answer.type, 'placed', JSON.stringify(answer))
  return { control, placed: answer as PlacedFrame, head: one!, other: other! }
}

/** The connection to the shard at a process, and its index. */
async function openShard(t: Test, { placed }: Placed, { url }: Process) {
  const index = placed.shards.findIndex((shard) => shard.url.startsWith(url))
  const client = await clientOf(t, placed.shards[index]!.url)
  const parameters = [MODEL.parameters![index]!]
  const shard = { index, generation: placed.generation }
  const opened = await client.open({ ...MODEL, run: placed.shards[index]!.run, parameters, shard, takeover: true })
  return { client, opened }
}

/** A step of a shard; its vote is on its way then. */
async function take({ client }: { client: RawClient }, step: number): Promise<string> {
  client.gradient(0, step, { values: GRADIENT })
  client.send({ type: 'end', step })
  return (await client.expect('receipt')).digest
}

async function end(control: RawClient, step: number): Promise<string> {
  control.send({ type: 'end', step })
  return (await control.expect('receipt')).digest
}

/** The digest after two steps that nothing disturbs. */
async function undisturbed(t: Test): Promise<string> {
  const whole = await place(t, await startCluster(t, 2))
  const shards = await Promise.all([whole.head, whole.other].map((process) => openShard(t, whole, process)))
  for (const shard of shards) await take(shard, 1)
  await end(whole.control, 1)
  for (const shard of shards) await take(shard, 2)
  return end(whole.control, 2)
}

t.test('a vote waits for a head that is down, and is cast again for the next generation', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
  const before = await place(t, processes)
  const { head, other } = before
  const shard = await openShard(t, before, other)
  await head.stop()
  const voted = await take(shard, 1)
  await head.start()
  // The vote is of the generation that the head had: it is refused, and so the shard's members open the run again.
  t.match(await shard.client.next(), { type: 'error', code: 'STALE_GENERATION' })
  t.match(await shard.client.closed(), { code: 4409 })

  const after = await place(t, processes)
  t.ok(after.placed.generation > before.placed.generation)
  t.match(after.placed, { step: 0, resumed: true })
  const ahead = await openShard(t, after, other)
  t.match(ahead.opened, { step: 1, digest: voted })
  const own = await openShard(t, after, head)
  await take(own, 1)
  await end(after.control, 1)
  for (const one of [ahead, own]) await take(one, 2)
  t.equal(await end(after.control, 2), await undisturbed(t))
})

t.test('a shard whose vote went down with it and its head casts it from its journal', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
  const before = await place(t, processes)
  const voted = await Promise.all(processes.map(async (one) => take(await openShard(t, before, one), 1)))
  const committed = await end(before.control, 1)
  await take(await openShard(t, before, before.head), 2)
  for (const process of processes) await process.stop()
  for (const process of processes) await process.start()

  const after = await place(t, processes)
  t.match(after.placed, { step: 1, digest: committed, resumed: true })
  const ahead = await openShard(t, after, before.head)
  t.equal(ahead.opened.step, 2)
  const behind = await openShard(t, after, before.other)
  t.match(behind.opened, { step: 1, digest: voted[processes.indexOf(before.other)] })
  await take(behind, 2)
  t.equal(await end(after.control, 2), await undisturbed(t))
})

t.test('a head that drains waits for the step that its control connection waits for', async (t) => {
  const processes = await startCluster(t, 2, { drain_seconds: 60 })
  const whole = await place(t, processes)
  const idle = await place(t, processes)
  const shards = await Promise.all([whole.head, whole.other].map((process) => openShard(t, whole, process)))
  await take(shards[0]!, 1)
  whole.control.send({ type: 'end', step: 1 })
  // Frames are taken in their order: with the answer the head has the `end`.
  const answered = once(whole.control.socket, 'pong')
  whole.control.socket.ping()
  await answered
  const drained = whole.head.app.drain()
  t.match(await whole.control.next(), { type: 'draining' })
  await idle.control.closed()
  await take(shards[1]!, 1)
  t.match(await whole.control.next(), { type: 'receipt', step: 1, replayed: false })
  await whole.control.closed()
  await drained
})
