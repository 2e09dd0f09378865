import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import t from 'tap'
import { known, MODEL, type Trace, train, undisturbed } from '../run/trainer.js'
import { RawClient, type Service, startService, until } from '../service.js'

const LAST = 8
const id = (step: number) => `step-${String(step).padStart(12, '0')}`
const start = (data: string, settings: Parameters<typeof startService>[0] = {}) =>
  startService({ data, durability: 'journal', checkpoint_steps: 0, lanes: 1, staging_bytes: 2 ** 20, ...settings })

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})

async function resumed(service: Service, open: object = {}) {
  const client = await RawClient.connect(service.url)
  client.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume', takeover: true, ...open })
  const answer = await client.next()
  await client.close()
  return answer
}

t.test('a refused open that was to go back loses no step of a journal', async (t) => {
  const data = t.testdir({})
  const first = await start(data)
  for (const run of ['a', 'r']) await (await train(first, { run, last: 3 })).client.close()
  await first.app.close()
  // Only one run fits into the memory: `r` stays on the disk.
  const second = await start(data, { max_runs: 1 })
  await second.restored
  await fetch(`${second.http}/v1/runs/a`, { method: 'DELETE' })
  t.match(await resumed(second, { checkpoint: id(0), parameters: MODEL.parameters.slice(1) }), { code: 'RUN_MISMATCH' })
  t.match(await resumed(second), { type: 'opened', step: 3, digest: reference[2]!.digest })
  await second.app.close()
})

t.test('groups that a connection gave are gone with the step that they were given at', async (t) => {
  const data = t.testdir({})
  const first = await start(data)
  const { client } = await train(first, { last: 2 })
  await first.runs.keeper('r').take('two')
  await client.close()
  await (await train(first, { last: 4, open: { mode: 'resume' } })).client.close()
  const groups = MODEL.groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 0.5 } : group))
  t.match(await resumed(first, { groups }), { step: 4, groups: { sgd: { lr: 0.5 } } })
  const back = await train(first, { last: 4, open: { mode: 'resume', checkpoint: 'two' } })
  t.match(back.opened, { step: 2, groups: { sgd: { lr: 0.001 } } })
  t.same(known(back.traces), known(reference.slice(2, 4)))
  await back.client.close()
  await first.app.close()
  const second = await start(data)
  t.match(await resumed(second), { step: 4, groups: { sgd: { lr: 0.001 } } })
  await second.app.close()
})

t.test('groups that were given after the checkpoint that a run comes back at are gone', async (t) => {
  const data = t.testdir({})
  const settings = { durability: 'checkpoint' } as const
  const first = await start(data, settings)
  await (await train(first, { last: 2 })).client.close()
  const groups = MODEL.groups.map((group) => (group.name === 'sgd' ? { ...group, lr: 0.5 } : group))
  t.match(await resumed(first, { groups }), { step: 2, groups: { sgd: { lr: 0.5 } } })
  await first.app.close()
  const second = await start(data, settings)
  const back = await train(second, { last: 2, open: { mode: 'resume' } })
  t.equal(back.opened.step, 0)
  t.same(known(back.traces), known(reference.slice(0, 2)))
  await back.client.close()
  await second.runs.keeper('r').take()
  await second.app.close()
  const third = await start(data, settings)
  t.match(await resumed(third), { step: 2, groups: { sgd: { lr: 0.001 } } })
  await third.app.close()
})

t.test('a checkpoint that is asked for while a run goes back is one of where it goes', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  const keeper = service.runs.keeper('r')
  await keeper.take('one')
  await client.close()
  await (await train(service, { last: 3, open: { mode: 'resume' } })).client.close()
  const run = service.runs.get('r')
  const back = resumed(service, { checkpoint: 'one' })
  await until(() => run.journal === undefined)
  t.match(await keeper.take(), { checkpoint: id(1) })
  t.match(await back, { type: 'opened', step: 1 })
  t.same(readdirSync(join(data, 'runs', 'r', 'checkpoints')).sort(), [id(0), id(1)])
  await service.app.close()
})
