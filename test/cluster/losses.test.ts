import t, { type Test } from 'tap'
import { type Client, connect } from '../../src/client/client.js'
import { gradientsOf, modelOf, weightsOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { type Process, startCluster, wholeOf } from './service.js'

const STEPS = 4
/** The processes come and go while the client tries again. */
const PATIENT = { ...QUICK, retries: 400 }

async function clientOf(t: Test, { url }: Process): Promise<Client> {
  const client = await connect(url, PATIENT)
  t.teardown(() => client.close())
  return client
}

/** Some steps, in the middle of each of which something may happen. */
async function train(
  client: Client,
  name: string,
  shards: number,
  happens: (step: number) => Promise<void> = async () => {},
) {
  const model = modelOf(name)
  const run = await client.open({ ...model, shards })
  for (let step = 1; step <= STEPS; step++) {
    run.begin()
    for (const [index, gradient] of gradientsOf(model.parameters, step).entries()) {
      if (index === 2) await happens(step)
      run.gradient(index, gradient)
    }
    await run.end()
  }
  return { digest: run.digest, weights: weightsOf(model.parameters) }
}

async function restart(...processes: Process[]): Promise<void> {
  for (const process of processes) await process.stop()
  for (const process of processes) await process.start()
}

t.test(
  'with a journal a run outlives any of its processes, and its digest is that of an undisturbed one',
  async (t) => {
    const processes = await startCluster(t, 2, { keeps: true, durability: 'journal' })
    const client = await clientOf(t, processes[0]!)
    const undisturbed = await train(client, 'undisturbed', 1)
    const disturbed = await train(client, 'disturbed', 2, async (step) => {
      const { head, body } = await wholeOf(processes, 'disturbed')
      t.equal(body.step, step - 1)
      if (step === 2) await restart(...processes.filter((process) => process !== head))
      if (step === 3) await restart(head)
      if (step === 4) await restart(...processes)
    })
    t.same(disturbed, undisturbed)
  },
)

t.test('a shard whose process has forgotten it is refused, and so is a whole whose head has', async (t) => {
  const processes = await startCluster(t, 2)
  const client = await clientOf(t, processes[0]!)
  const head = (name: string) => wholeOf(processes, name).then((whole) => whole.head)
  const other = (name: string) => head(name).then((one) => processes.find((process) => process !== one)!)
  await t.rejects(
    train(client, 'lost-shard', 2, async (step) => {
      if (step === 3) await restart(await other('lost-shard'))
    }),
    { code: 'RUN_NOT_FOUND', message: /shard 'lost-shard~\d' is not here any more, and the run is at step 2/ },
  )
  await t.rejects(
    train(client, 'lost-head', 2, async (step) => {
      if (step === 3) await restart(await head('lost-head'))
    }),
    { code: 'RUN_NOT_FOUND' },
  )
  // The name is free at its head: the shard that has steps is in the way.
  await t.rejects(client.open({ ...modelOf('lost-head'), shards: 2 }), {
    code: 'STEP_CONFLICT',
    message: /shard 'lost-head~\d' is at step 2 .* run 'lost-head' at step 0/,
  })
})

t.test('a whole goes back to a checkpoint of all its shards', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, checkpoint_steps: 0 })
  const client = await clientOf(t, processes[0]!)
  const model = modelOf('returns')
  const run = await client.open({ ...model, shards: 2 })
  const step = (number: number) => run.step(gradientsOf(model.parameters, number))
  await step(1)
  await step(2)
  const { generation } = (await wholeOf(processes, 'returns')).body
  const weights = weightsOf(model.parameters)
  const checkpoint = await run.checkpoint({ tag: 'best' })
  t.match(checkpoint, { step: 2, digest: run.digest })
  await step(3)
  const digest = run.digest
  await run.reopen({ checkpoint: 'best' })
  t.match(run, { step_count: 2, digest: checkpoint.digest })
  t.ok((await wholeOf(processes, 'returns')).body.generation > generation)
  for (const [i, { data }] of model.parameters.entries())
    new Uint8Array(data.buffer, data.byteOffset, data.byteLength).set(weights[i]!)
  await step(3)
  t.equal(run.digest, digest, 'the step comes out as the first time')

  await t.rejects(run.reopen({ checkpoint: 'none' }), { code: 'NOT_FOUND' })
  await run.reopen()
  t.equal(run.step_count, 3)
  // Both come back at a checkpoint that each has taken for itself, none: the whole goes back to the one that all have.
  await restart(...processes)
  await t.rejects(step(4), { code: 'STEP_CONFLICT', message: /go back to a checkpoint of the whole/ })
  await run.reopen({ checkpoint: checkpoint.checkpoint })
  for (const [i, { data }] of model.parameters.entries())
    new Uint8Array(data.buffer, data.byteOffset, data.byteLength).set(weights[i]!)
  await step(3)
  t.equal(run.digest, digest)

  const { head } = await wholeOf(processes, 'returns')
  t.equal((await fetch(`${head.peer}/v1/runs/returns`, { method: 'DELETE' })).status, 204)
  await restart(...processes)
  await t.rejects(wholeOf(processes, 'returns'), 'what was deleted does not come back')
  t.equal((await client.open({ ...modelOf('returns'), mode: 'create', shards: 2 })).step_count, 0)
})
