import t from 'tap'
import type { OpenFrame, PlacedFrame } from '../../src/wire/frame.js'
import { RawClient } from '../service.js'
import { startCluster, wholeOf } from './service.js'

const MODEL: Omit<OpenFrame, 'type' | 'protocol' | 'run'> = {
  groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
  parameters: [
    { name: 'a', shape: [2], group: 'all' },
    { name: 'b', shape: [2], group: 'all' },
  ],
}
const GRADIENT = Float32Array.of(1, 2)

const processes = await startCluster(t, 2, { keeps: true, checkpoint_steps: 0 })

async function clientOf(url: string): Promise<RawClient> {
  const client = await RawClient.connect(url)
  t.teardown(() => client.socket.terminate())
  return client
}

/** A control connection of the run `gpt`, wherever its head is. */
async function place(
  change: Partial<OpenFrame> = {},
  url = `${processes[0]!.url}/v1/stream`,
): Promise<[RawClient, PlacedFrame]> {
  const client = await clientOf(url)
  client.send({ type: 'open', protocol: 1, run: 'gpt', shards: 2, ...MODEL, ...change })
  const answer = await client.next()
  if (answer.type === 'moved') return place(change, answer.url)
  t.equal(answer.type, 'placed', JSON.stringify(answer))
  return [client, answer as PlacedFrame]
}

/** The connections to all shards. */
function openShards({ shards, generation }: PlacedFrame): Promise<RawClient[]> {
  return Promise.all(
    shards.map(async ({ run, url, checkpoint }, index) => {
      const client = await clientOf(url)
      const back = checkpoint === undefined ? {} : { checkpoint, mode: 'resume' as const }
      const parameters = [MODEL.parameters![index]!]
      await client.open({ ...MODEL, run, parameters, shard: { index, generation }, takeover: true, ...back })
      return client
    }),
  )
}

/** A step of a shard: with a gradient, or without. */
async function take(shard: RawClient, step: number, isSkipped = false): Promise<void> {
  if (!isSkipped) shard.gradient(0, step, { values: GRADIENT })
  shard.send({ type: 'end', step, ...(isSkipped && { skipped: [0] }) })
  await shard.expect('receipt')
}

async function end(control: RawClient, step: number): Promise<string> {
  control.send({ type: 'end', step })
  return (await control.expect('receipt')).digest
}

t.test('what was opened by an older assignment can change nothing any more', async (t) => {
  const [control, placed] = await place()
  const shards = await openShards(placed)
  for (const shard of shards) await take(shard, 1)
  const first = await end(control, 1)
  control.send({ type: 'checkpoint', tag: 'first' })
  const { checkpoint } = await control.expect('checkpointed')
  for (const shard of shards) await take(shard, 2)
  await end(control, 2)
  control.send({ type: 'checkpoint', tag: 'second' })
  await control.expect('checkpointed')
  await take(shards[0]!, 3)
  control.send({ type: 'checkpoint' })
  t.match(await control.next(), { code: 'FRAME_UNEXPECTED', message: /in step 3/ })
  await control.closed()

  const [waiting] = await place()
  waiting.send({ type: 'end', step: 3 })
  const [again, back] = await place({ mode: 'resume', checkpoint: 'first' })
  t.match(back, { step: 1, digest: first, resumed: true })
  t.ok(back.generation > placed.generation)
  t.match(await waiting.next(), { code: 'STALE_GENERATION' })
  t.match(await waiting.closed(), { code: 4409 })
  // A member of before goes on, until it has its shard vote.
  shards[1]!.gradient(0, 3, { values: GRADIENT })
  shards[1]!.send({ type: 'end', step: 3 })
  await shards[1]!.expect('receipt')
  t.match(await shards[1]!.next(), { code: 'STALE_GENERATION' })
  t.match(await shards[1]!.closed(), { code: 4409 })

  const now = await openShards(back)
  await take(now[0]!, 2, true)
  await take(now[1]!, 2)
  await end(again, 2)
  const [stranger] = await Promise.all([clientOf(`${processes[0]!.url}/v1/stream`)])
  for (const process of processes) {
    const other = process === processes[0] ? stranger! : await clientOf(`${process.url}/v1/stream`)
    other.send({ type: 'open', protocol: 1, run: 'gpt', shards: 2, mode: 'resume', checkpoint: 'second' })
    const answer = await other.next()
    if (answer.type === 'moved') continue
    t.match(answer, { code: 'NOT_FOUND', message: /of a history that run 'gpt' has left/ })
  }
  const [, there] = await place({ mode: 'resume', checkpoint })
  t.equal(there.step, 1)
})

t.test('a shard whose head has forgotten the run sends its members away', async (t) => {
  const forgetful = await startCluster(t, 2)
  const [, placed] = await place({}, `${forgetful[0]!.url}/v1/stream`)
  const shards = await openShards(placed)
  const { head } = await wholeOf(forgetful, 'gpt')
  t.teardown(() => Promise.all(shards.map(({ socket }) => socket.terminate())))
  const other = placed.shards.findIndex(({ url }) => !url.startsWith(head.url))
  await head.stop()
  await head.start()
  await take(shards[other]!, 1)
  t.match(await shards[other]!.next(), { code: 'RUN_NOT_FOUND' })
  t.match(await shards[other]!.closed(), { code: 1008 })
})
