import { existsSync, mkdirSync, readdirSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { pino } from 'pino'
import t from 'tap'
import { buildApp } from '../../src/app.js'
import { configOf } from '../../src/config.js'
import type { Job } from '../../src/device/job.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import { parseGroups } from '../../src/run/declaration.js'
import { MODEL, train, trainStep } from '../run/trainer.js'
import { RawClient, until } from '../service.js'
import { checkpoints, id, runFolder, start as startIn } from './data-folder.js'

const start = (data: string, settings: Parameters<typeof startIn>[1] = {}) =>
  startIn(data, { checkpoint_steps: 0, durability: 'journal', ...settings })
const post = async (url: string, tag: string) => {
  const headers = { 'content-type': 'application/json' }
  return fetch(url, { method: 'POST', headers, body: JSON.stringify({ tag }) })
}

t.test('runs that are deleted at the same time are all gone', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const runs = Array.from({ length: 12 }, (_, i) => `r${i}`)
  for (const run of runs) await (await train(service, { run, last: 0 })).client.close()
  // The clock stands still, as within a millisecond, or where it was set back.
  const { now } = Date
  Date.now = () => 1
  t.teardown(() => {
    Date.now = now
  })
  const deleted = await Promise.all(runs.map((run) => fetch(`${service.http}/v1/runs/${run}`, { method: 'DELETE' })))
  t.same(
    deleted.map(({ status }) => status),
    runs.map(() => 204),
  )
  t.same(readdirSync(join(data, 'runs')), [])
  await service.app.close()
})

t.test('an open that cannot be noted leaves no run behind, in memory or on the disk', async (t) => {
  const data = t.testdir({})
  const folder = runFolder(data)
  // Writing fails between a new run's first checkpoint and the note that it was opened.
  const write = (line: string) => {
    if (line.includes('checkpoint_written') && existsSync(folder)) mkdirSync(join(folder, 'run.json.new'))
  }
  const built = await buildApp({
    config: configOf({ device: 'cpu', port: 0, data, durability: 'journal', lanes: 1, staging_bytes: 2 ** 20 }),
    logger: pino({ level: 'info' }, { write }),
  })
  const url = await built.app.listen({ port: 0, host: '127.0.0.1' })
  const client = await RawClient.connect(`${url.replace('http', 'ws')}/v1/stream`)
  client.send({ type: 'open', protocol: 1, run: 'r', ...MODEL })
  t.match(await client.expect('error'), {
    code: 'STORAGE_FAILED',
    message: /^the folder of run 'r' cannot be written: /,
  })
  t.notOk(existsSync(folder))
  t.same([built.runs.list(), [...built.runs.stored], built.device.admittedBytes], [[], [], 0])
  await client.close()
  await built.app.close()
})

t.test('a new run whose folder is taken away under it is refused, and what cannot be removed is logged', async (t) => {
  const data = t.testdir({})
  const events: { event: string; reason?: string }[] = []
  const write = (line: string) => {
    events.push(JSON.parse(line))
    if (line.includes('checkpoint_written')) rmSync(runFolder(data), { recursive: true })
  }
  const built = await buildApp({
    config: configOf({ device: 'cpu', port: 0, data, lanes: 1, staging_bytes: 2 ** 20 }),
    logger: pino({ level: 'info' }, { write }),
  })
  const url = await built.app.listen({ port: 0, host: '127.0.0.1' })
  const client = await RawClient.connect(`${url.replace('http', 'ws')}/v1/stream`)
  client.send({ type: 'open', protocol: 1, run: 'r', ...MODEL })
  t.match(await client.expect('error'), { code: 'STORAGE_FAILED', message: /ENOENT/ })
  t.match(
    events.find(({ event }) => event === 'run_left_behind'),
    { reason: /ENOENT/ },
  )
  t.same([built.runs.list(), built.device.admittedBytes], [[], 0])
  await client.close()
  await built.app.close()
})

t.test('a checkpoint that cannot be written leaves none of its files behind', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  mkdirSync(join(runFolder(data), 'checkpoints', id(1), 'manifest.json.new'), { recursive: true })
  await t.rejects(service.runs.keeper('r').take(), { code: 'STORAGE_FAILED', message: /EISDIR/ })
  t.same(checkpoints(data), [id(0)])
  t.match(await service.runs.keeper('r').take(), { checkpoint: id(1) })
  await client.close()
  await service.app.close()
})

t.test('a checkpoint is removed after the one that is being written', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  const keeper = service.runs.keeper('r')
  const [taken] = await Promise.all([keeper.take(), keeper.remove(keeper.store.newest!)])
  t.match(taken, { step: 1 })
  t.same(checkpoints(data), [id(1)])
  await client.close()
  await service.app.close()
})

t.test('tags that are given at the same time are all there', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  await (await train(service, { last: 1 })).client.close()
  await service.runs.keeper('r').take()
  const tags = Array.from({ length: 6 }, (_, i) => `tag ${i}`)
  const url = `${service.http}/v1/runs/r/checkpoints`
  const answers = await Promise.all(tags.map((tag) => post(url, tag)))
  t.same(
    answers.map(({ status }) => status),
    tags.map(() => 201),
  )
  t.same([...service.runs.keeper('r').store.newest!.tags].sort(), tags)
  await service.app.close()
})

t.test('a checkpoint that became due while one was written is taken after it', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { checkpoint_steps: 1 })
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', ...MODEL })
  for (const step of [1, 2, 3]) await trainStep(client, step)
  const keeper = service.runs.keeper('r')
  await keeper.settled()
  t.equal(keeper.store.newest?.step, 3)
  await client.close()
  await service.app.close()
})

t.test('no checkpoint is taken while a step that skips every parameter is on its way to the disk', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  const run = service.runs.get('r')
  const segment = join(runFolder(data), 'journal', '000000000001.journal')
  const { size } = statSync(segment)
  client.send({ type: 'end', step: 2, skipped: [...MODEL.parameters.keys()] })
  // At this moment the step's record is written, and not yet synced.
  await until(() => statSync(segment).size > size)
  t.equal(run.step, 1)
  await t.rejects(service.runs.keeper('r').take(), { code: 'STEP_INCOMPLETE' })
  const { digest } = await client.expect('receipt')
  await client.close()
  await service.app.close()
  const again = await start(data)
  const next = await RawClient.connect(again.url)
  t.match(await next.open({ run: 'r', mode: 'resume' }), { step: 2, digest })
  await next.close()
  await again.app.close()
})

t.test('a folder that a run cannot be restored into is told as what it is, and the run is there later', async (t) => {
  const data = t.testdir({})
  const first = await start(data)
  await (await train(first, { last: 2 })).client.close()
  await first.app.close()
  const blocked = join(runFolder(data), 'journal', '000000000003.journal')
  mkdirSync(blocked)
  const second = await start(data)
  await second.restored
  const client = await RawClient.connect(second.url)
  client.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume' })
  t.match(await client.expect('error'), { code: 'STORAGE_FAILED', message: /^run 'r' cannot be restored: EISDIR/ })
  rmSync(blocked, { recursive: true })
  t.match(await client.open({ run: 'r', mode: 'resume' }), { step: 2 })
  await client.close()
  await second.app.close()
})

t.test('a run whose device has failed is not told to be gone', async (t) => {
  const service = await start(t.testdir({}))
  const { client } = await train(service, { last: 1 })
  const { device } = service
  const region = device.allocateHost(64)
  const kernel = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' } as const
  const plan = { kernel, tasks: [{ dims: [16], offset: 0 }], scalars: {}, scale: 1, decay: 0, rms_factor: 1 }
  const memory = { next: [device.memory.allocate(64).pointer], update: region }
  const job: Job = { plan, gradient: region, gradient_scale: 1, state: undefined, ...memory }
  await t.rejects(
    device.run(() => job, { cancelled: false }),
    { code: 'DEVICE_FAILED' },
  )
  t.match(await client.expect('error'), { code: 'DEVICE_FAILED' })
  await client.closed()
  const next = await RawClient.connect(service.url)
  next.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume', takeover: true })
  t.match(await next.expect('error'), { code: 'DEVICE_FAILED', retryable: true })
  await next.close()
  // A run that was admitted just before the failure.
  const admitted = device.admittedBytes
  const groups = parseGroups([{ name: 'g', algorithm: 'sgd' }], new Map())
  const declaration = { groups, parameters: parseParameters([{ name: 'w', shape: [2], group: 'g' }], groups) }
  await t.rejects(service.runs.build('late', { ...declaration, attentions: [] }, ''), { code: 'DEVICE_FAILED' })
  t.equal(device.admittedBytes, admitted)
  await service.app.close()
})
