import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { exportCommand } from '../../src/commands/export.js'
import type { components } from '../../src/http/openapi.js'
import { SILENT } from '../commands/interchange.js'
import { known, type Trace, train, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, type Service, startService } from '../service.js'
import { checkpoints, flip, id, runFolder, start as startIn } from './data-folder.js'

type Checkpoint = components['schemas']['Checkpoint']

/** A service that has restored its runs. */
async function start(t: Test, data: string, settings: Parameters<typeof startIn>[1] = {}): Promise<Service> {
  const service = await startIn(data, { checkpoint_steps: 0, ...settings })
  t.teardown(() => service.app.close())
  await service.restored
  return service
}

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, 8)
  await service.app.close()
})

async function listed({ http }: Service, run = 'r'): Promise<Checkpoint[]> {
  const answer = await fetch(`${http}/v1/runs/${run}/checkpoints`)
  return ((await answer.json()) as { checkpoints: Checkpoint[] }).checkpoints
}

/** Step, branch and tags of each, and whether the run has gone through it. */
const told = (all: readonly Checkpoint[]) =>
  all.map(({ step, branch, tags, in_history }) => [step, branch, tags.join(), in_history] as const)

/** Opens the run where it is, or at a checkpoint, and gives the step and the digest. */
async function at(service: Service, checkpoint?: string) {
  const client = await RawClient.connect(service.url)
  const { step, digest } = await client.open({ run: 'r', mode: 'resume', ...(checkpoint && { checkpoint }) })
  return { client, step, digest }
}

/** Steps 1 to 7 with checkpoints of 3, 5 and 7, of which 5 and 7 are tagged; then from 5 on other steps to 7. */
async function twoBranches(service: Service) {
  const { client } = await train(service, { last: 3 })
  const keeper = service.runs.keeper('r')
  await keeper.take()
  for (const step of [4, 5]) await trainStep(client, step)
  await keeper.take('five')
  for (const step of [6, 7]) await trainStep(client, step)
  await keeper.take('seven')
  await trainStep(client, 8)
  await keeper.take()
  await client.close()
  const other = await at(service, 'five')
  const digests: string[] = []
  for (const step of [6, 7]) digests.push((await trainStep(other.client, step, step + 10)).digest)
  const taken = await keeper.take('other')
  await other.client.close()
  return { taken, digest: digests.at(-1)! }
}

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(
    `${durability}: what was tagged outlives going back, and can be gone to, before a restart and after`,
    async (t) => {
      const data = t.testdir({})
      let service = await start(t, data, { durability })
      const { taken, digest } = await twoBranches(service)
      t.match(taken, { checkpoint: `${id(7)}.1`, branch: 1, digest })
      const all = [
        [0, 0, '', true],
        [3, 0, '', true],
        [5, 0, 'five', true],
        [7, 0, 'seven', false],
        [7, 1, 'other', true],
      ] as const
      t.same(told(await listed(service)), all, 'the one of step 8 had no tag')
      await service.app.close()
      service = await start(t, data, { durability })
      t.same(told(await listed(service)), all)
      const here = await at(service)
      t.match(here, { step: 7, digest })
      await here.client.close()
      // To the branch that was left, on from there, back again, and to where both begin.
      const first = await at(service, 'seven')
      t.match(first, { step: 7, digest: reference[6]!.digest })
      t.same(known([await trainStep(first.client, 8)]), known(reference.slice(7)))
      await first.client.close()
      t.same(
        told(await listed(service)),
        all.map(([step, branch, tag]) => [step, branch, tag, tag !== 'other']),
      )
      const second = await at(service, 'other')
      t.match(second, { step: 7, digest })
      await second.client.close()
      const third = await at(service, 'five')
      t.match(third, { step: 5, digest: reference[4]!.digest })
      await third.client.close()
      t.same(
        told(await listed(service)),
        all.map(([step, branch, tag]) => [step, branch, tag, step <= 5]),
      )
      await service.app.close()
      service = await start(t, data, { durability })
      const last = await train(service, { last: 8, open: { mode: 'resume' } })
      t.same(known(last.traces), known(reference.slice(5)))
      await last.client.close()
      await service.app.close()
    },
  )
}

t.test(
  'a branch of which nothing is left leaves nothing behind, also where another one begins behind it',
  async (t) => {
    const data = t.testdir({})
    const service = await start(t, data, { durability: 'journal' })
    await (await train(service, { last: 1 })).client.close()
    const keeper = service.runs.keeper('r')
    const branches = () => readdirSync(join(runFolder(data), 'branches')).sort()
    const goOn = async (checkpoint: string, as: number, tag?: string) => {
      const { client, step } = await at(service, checkpoint)
      await trainStep(client, step + 1, as)
      const taken = await keeper.take(tag)
      await client.close()
      return taken
    }
    const first = await goOn(id(0), 11)
    t.same(branches(), ['1'])
    const second = await goOn(first.checkpoint, 12)
    t.match(second, { branch: 1, step: 2 }, 'nothing came after it yet')
    const third = await goOn(first.checkpoint, 13, 'kept')
    t.match(third, { branch: 2, step: 2 })
    t.same(branches(), ['1', '2'], 'the first checkpoint of the newest branch is of the one before')
    t.same((await fetch(`${service.http}/v1/runs/r/checkpoints/${first.checkpoint}`, { method: 'DELETE' })).status, 204)
    const fourth = await goOn(id(0), 14)
    t.same(branches(), ['2', '3'])
    t.same(keeper.store.identity.branches, [
      { branch: 2, parent: 0, checkpoint: id(0) },
      { branch: 3, parent: 0, checkpoint: id(0) },
    ])
    t.same(told(await listed(service)), [
      [0, 0, '', true],
      [1, 3, '', true],
      [2, 2, 'kept', false],
    ])
    await service.app.close()
    const again = await start(t, data, { durability: 'journal' })
    const last = await at(again)
    t.match(last, { step: 1, digest: fourth.digest })
    await last.client.close()
    const kept = await at(again, 'kept')
    t.match(kept, { step: 2, digest: third.digest })
    await kept.client.close()
    await again.app.close()
  },
)

t.test('a tag leads to the present history first, and to the newest branch else', async (t) => {
  const data = t.testdir({})
  const service = await start(t, data)
  const { client } = await train(service, { last: 1 })
  const keeper = service.runs.keeper('r')
  const first = await keeper.take('best')
  await trainStep(client, 2)
  const second = await keeper.take('best')
  await client.close()
  const back = await at(service, id(0))
  await trainStep(back.client, 1, 30)
  t.same(keeper.store.find('best'), { ...second }, 'where the history has none')
  t.equal(keeper.store.find(first.checkpoint), undefined, 'the tag led to a newer one of its branch')
  const third = await keeper.take('best')
  t.same(keeper.store.find('best'), third)
  await back.client.close()
  await (await at(service, id(0))).client.close()
  t.same(keeper.store.find('best'), third)
  const { status } = await fetch(`${service.http}/v1/runs/r/checkpoints/best`, { method: 'DELETE' })
  t.equal(status, 204)
  t.same(keeper.store.find('best'), second)
  await service.app.close()
})

t.test('checkpoints of every branch are exported by id and tag, and what cannot be read stays', async (t) => {
  const data = t.testdir({})
  const service = await start(t, data)
  const { digest } = await twoBranches(service)
  const exported = (name: string, ...checkpoint: string[]) => {
    const out = join(data, `${name}.safetensors`)
    return exportCommand(['r', '--to', 'safetensors', '--out', out, '--data', data, ...checkpoint], {}, SILENT)
  }
  t.match(await exported('newest'), `run 'r' at step 7, digest ${digest}`)
  t.match(await exported('seven', '--checkpoint', 'seven'), `run 'r' at step 7, digest ${reference[6]!.digest}`)
  t.match(await exported('id', '--checkpoint', `${id(7)}.1`), `run 'r' at step 7, digest ${digest}`)
  await service.app.close()
  // Nobody can tell any more whether it has a tag.
  flip(join(runFolder(data), 'checkpoints', id(7), 'manifest.json'), 30)
  const again = await start(t, data)
  t.match(
    (await listed(again)).find(({ checkpoint }) => checkpoint === id(7)),
    { branch: 0, in_history: false, problem: /manifest\.json has SHA-256/ },
  )
  t.match(again.runs.get('r'), { step: 7, digest })
  const removed = await fetch(`${again.http}/v1/runs/r/checkpoints/${id(7)}`, { method: 'DELETE' })
  t.equal(removed.status, 204)
  t.same(checkpoints(data), [id(0), id(3), id(5)])
  t.ok(existsSync(join(runFolder(data), 'branches', '1', 'checkpoints', `${id(7)}.1`)))
  await again.app.close()
})

t.test('going to where a run is already begins no branch', async (t) => {
  const data = t.testdir({})
  const service = await start(t, data, { durability: 'journal' })
  const { client } = await train(service, { last: 2 })
  await service.runs.keeper('r').take('two')
  await client.close()
  for (const _ of [1, 2]) await (await at(service, 'two')).client.close()
  t.equal(service.runs.keeper('r').store.identity.branch, 0)
  t.notOk(readdirSync(runFolder(data)).includes('branches'))
  await service.app.close()
})
