import t from 'tap'
import { connect } from '../../src/client/client.js'
import { gradientsOf, modelOf, weightsOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { TestStore } from '../store/objects/stores.js'
import { startCluster, wholeOf } from './service.js'

const store = await TestStore.start(t)
const STEPS = 4

t.test('processes share one bucket, and a run outlives each of them there', async (t) => {
  const address = store.address()
  const { s3_path_style, ...settings } = store.settings(address)
  const processes = await startCluster(t, 2, {
    ...{ ...settings, s3_path_style: String(s3_path_style), s3_lease_seconds: 1, durability: 'journal' },
  })
  const client = await connect(processes[0]!.url, { ...QUICK, retries: 400 })
  t.teardown(() => client.close())
  const train = async (name: string, shards: number, between: (step: number) => Promise<void>) => {
    const model = modelOf(name)
    const run = await client.open({ ...model, shards })
    for (let step = 1; step <= STEPS; step++) {
      await run.step(gradientsOf(model.parameters, step))
      await between(step)
    }
    return { run, model, digest: run.digest, weights: weightsOf(model.parameters) }
  }
  const undisturbed = await train('undisturbed', 1, async () => {})
  const disturbed = await train('disturbed', 2, async (step) => {
    const { head, body } = await wholeOf(processes, 'disturbed')
    t.equal(body.step, step)
    const stopped = step === 2 ? processes.filter((one) => one !== head) : step === 3 ? [head] : []
    for (const process of stopped) await process.stop()
    for (const process of stopped) await process.start()
  })
  t.same(disturbed.digest, undisturbed.digest)
  t.same(disturbed.weights, undisturbed.weights)
  const { checkpoint } = await disturbed.run.checkpoint({ tag: 'last' })
  t.ok(checkpoint)
  const keys = [...(store.fake?.objects.keys() ?? [])].map((key) => key.slice(address.prefix.length))
  const roots = new Set(keys.map((key) => key.split('/').slice(0, 2).join('/')))
  const names = processes.map(({ peer }) => `peers/${peer.replace('://', '_').replace(':', '_')}`)
  if (store.fake)
    t.same([...roots].sort(), ['checkpoints/disturbed', 'logs/disturbed', ...names, 'wholes/disturbed.json'].sort())
})
