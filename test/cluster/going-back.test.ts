import { type FileHandle, open } from 'node:fs/promises'
import t, { type Test } from 'tap'
import { connect } from '../../src/client/client.js'
import { gradientsOf, modelOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { RawClient } from '../service.js'
import { type Process, startCluster, wholeOf } from './service.js'

// What a whole comes to that cannot go back, cannot be begun or cannot be deleted: it is then as it was.

const ONCE = { ...QUICK, retries: 0 }

/** A whole of two shards, and how it takes its next step. */
async function trained(t: Test, processes: readonly Process[]) {
  const client = await connect(processes[0]!.url, ONCE)
  t.teardown(() => client.close())
  const model = modelOf('gpt')
  const run = await client.open({ ...model, shards: 2 })
  const step = () => run.step(gradientsOf(model.parameters, run.step_count + 1))
  return { client, model, run, step }
}

/** Has the disk refuse each write for which something holds of its text, until the function is called. */
async function refuseWrites(t: Test, folder: string, isRefused: (text: string) => boolean): Promise<() => void> {
  const probe = await open(folder)
  const prototype: FileHandle = Object.getPrototypeOf(probe)
  await probe.close()
  const { write } = prototype
  return t.intercept(prototype, 'write', {
    value(this: FileHandle, bytes: Uint8Array, ...rest: unknown[]) {
      if (!isRefused(Buffer.from(bytes).toString())) return Reflect.apply(write, this, [bytes, ...rest])
      return Promise.reject(Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' }))
    },
  }).restore
}

t.test('a whole does not go back to a checkpoint that a shard has no more, or of which nobody can say', async (t) => {
  const processes = await startCluster(t, 2, {
    keeps: true,
    durability: 'journal',
    checkpoint_steps: 0,
    checkpoints_kept: 1,
  })
  const { run, step } = await trained(t, processes)
  await step()
  const { checkpoint } = await run.checkpoint()
  await run.checkpoint({ tag: 'best' })
  await step()
  await run.checkpoint()
  await step()
  const { head, body } = await wholeOf(processes, 'gpt')
  const other = body.shards.find(({ peer }) => peer !== head.peer)!
  const own = await fetch(`${other.peer}/v1/runs/${other.run}/checkpoints`)
  const { checkpoints } = (await own.json()) as { checkpoints: { checkpoint: string; step: number }[] }
  const first = checkpoints.find((one) => one.step === 1)!
  const path = `${other.peer}/v1/runs/${other.run}/checkpoints/${first.checkpoint}`
  t.equal((await fetch(path, { method: 'DELETE' })).status, 204)
  for (const name of [checkpoint, 'best'])
    await t.rejects(run.reopen({ checkpoint: name }), {
      code: 'NOT_FOUND',
      message: new RegExp(`'${name}' of run 'gpt' is not whole any more: ${other.peer} has no 'step-.*${other.run}`),
    })
  await run.reopen()
  await step()
  t.equal(run.step_count, 4, 'it goes on from where it was')
  t.equal((await wholeOf(processes, 'gpt')).body.generation, body.generation)

  await run.checkpoint({ tag: 'later' })
  const away = processes.find((process) => process !== head)!
  await away.stop()
  await t.rejects(run.reopen({ checkpoint: 'later' }), { code: 'PEER_FAILED' })
  await away.start()
  await away.app.restored
  await run.reopen()
  await step()
  t.equal(run.step_count, 5)
})

t.test(
  'no shard goes back without its whole: what opens it at a checkpoint of its own is refused before it does',
  async (t) => {
    const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
    const { run, step } = await trained(t, processes)
    await step()
    await run.checkpoint({ tag: 'first' })
    await step()
    await run.checkpoint({ tag: 'second' })
    const openAt = async (checkpoint: string) => {
      const { shards, generation } = (await wholeOf(processes, 'gpt')).body
      const [{ run: name, peer }] = shards as [(typeof shards)[number]]
      const client = await RawClient.connect(`${peer.replace('http', 'ws')}/v1/stream`)
      t.teardown(() => client.socket.terminate())
      const shard = { index: 0, generation }
      client.send({ type: 'open', protocol: 1, run: name, mode: 'resume', takeover: true, checkpoint, shard })
      const answer = await client.next()
      const { step } = (await (await fetch(`${peer}/v1/runs/${name}`)).json()) as { step: number }
      return { answer, step }
    }
    const conflict = { type: 'error', code: 'STEP_CONFLICT', message: /'gpt~0' is opened at checkpoint 'first'/ }
    t.match(await openAt('first'), { answer: { ...conflict, message: /its run has not gone back/ }, step: 2 })
    await run.reopen({ checkpoint: 'second' })
    t.match(await openAt('first'), { answer: { ...conflict, message: /has gone back to 'step-0*2' of it/ }, step: 2 })
    await step()
    t.match(await openAt('step-000000000002'), { answer: { code: 'STEP_CONFLICT' }, step: 3 })
    await run.reopen()
    await step()
    t.equal(run.step_count, 4)
  },
)

t.test('a whole whose disk fills up while it goes back goes on from where it was', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, checkpoint_steps: 0 })
  const { run, step } = await trained(t, processes)
  await step()
  const { digest } = await run.checkpoint({ tag: 'best' })
  await step()
  const fits = await refuseWrites(t, processes[0]!.data, (text) => /"kind":"begin".*"step":1,/.test(text))
  await t.rejects(run.reopen({ checkpoint: 'best' }), { code: 'STORAGE_FAILED', message: /ENOSPC/ })
  await run.reopen()
  await step()
  t.equal(run.step_count, 3)
  fits()
  await run.reopen({ checkpoint: 'best' })
  t.match(run, { step_count: 1, digest })
})

t.test('a whole that the disk has no room for is none, and its name is free', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true })
  const fits = await refuseWrites(t, processes[0]!.data, (text) => text.startsWith('{"position":1,'))
  await t.rejects(trained(t, processes), { code: 'STORAGE_FAILED', message: /log.jsonl' cannot be written: ENOSPC/ })
  await t.rejects(wholeOf(processes, 'gpt'))
  fits()
  const { run, step } = await trained(t, processes)
  await step()
  t.equal(run.step_count, 1)
})

t.test('a whole of which a process has not deleted its shard is opened by nobody until it has', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
  const { client, model, step } = await trained(t, processes)
  await step()
  const { head, body } = await wholeOf(processes, 'gpt')
  const away = processes.find((process) => process !== head)!
  const remove = () => fetch(`${head.peer}/v1/runs/gpt`, { method: 'DELETE' })
  await away.stop()
  t.equal((await remove()).status, 503)
  await away.start()
  await away.app.restored
  const deleted = { code: 'RUN_NOT_FOUND', message: /run 'gpt' was deleted; where a process did not answer, delete it/ }
  await t.rejects(client.open({ ...model, shards: 2 }), deleted)
  const shards = await fetch(`${head.peer}/v1/runs/gpt/shards`)
  t.match(await shards.json(), { code: 'RUN_NOT_FOUND' }, 'nor do its shards learn of a whole')
  t.equal((await remove()).status, 204)
  for (const { peer, run } of body.shards) t.equal((await fetch(`${peer}/v1/runs/${run}`)).status, 404)
  t.match(await client.open({ ...modelOf('gpt'), mode: 'create', shards: 2 }), { step_count: 0 })
})
