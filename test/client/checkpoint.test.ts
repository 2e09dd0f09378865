import t from 'tap'
import { connect } from '../../src/client/client.js'
import { normal, type Service, startService } from '../service.js'

const open = (data = normal(1, 12)) => ({
  run: 'r',
  groups: [{ name: 'g', algorithm: 'muon' }],
  parameters: [{ name: 'w', shape: [3, 4], group: 'g', data }],
})
const gradient = (step: number) => [normal(step, 12)]

let service: Service
t.beforeEach(async (t) => {
  service = await startService({ data: t.testdir({}), checkpoint_steps: 0, durability: 'journal' })
})
t.afterEach(() => service.app.close())

t.test('the client asks for checkpoints and goes back to one', async (t) => {
  const client = await connect(service.url)
  const run = await client.open(open())
  const first = await run.step(gradient(1))
  t.equal(first.durable, true)
  const kept = Float32Array.from(run.parameters[0]!.data as Float32Array)
  const taken = run.checkpoint({ tag: 'one' })
  const second = await run.step(gradient(2))
  t.match(await taken, { checkpoint: 'step-000000000001', step: 1, digest: first.digest })
  t.match(await run.checkpoint(), { step: 2, digest: second.digest })
  await t.rejects(run.checkpoint({ tag: '' }), { code: 'PARAMETER_INVALID' })
  const again = await client.open({ ...open(kept), mode: 'resume', takeover: true, checkpoint: 'one' })
  t.match(again.opened, { step: 1, resumed: true, digest: first.digest })
  t.match(await again.step(gradient(2)), { digest: second.digest })
  await client.close()
})

t.test('no checkpoint while a step is in flight; a lost connection is replaced for it', async (t) => {
  const client = await connect(service.url, { backoff: { first_seconds: 0.001 } })
  const run = await client.open(open())
  await run.step(gradient(1))
  run.gradient('w', gradient(2)[0]!)
  await t.rejects(run.checkpoint(), { code: 'STEP_CONFLICT', message: 'step 2 is still in flight' })
  await run.end()
  for (const socket of service.app.websocketServer.clients) socket.terminate()
  await t.rejects(run.checkpoint(), { code: 'CONNECTION_LOST' })
  t.match(await run.checkpoint(), { step: 2 })
  await client.close()
})
