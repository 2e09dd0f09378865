import t, { type Test } from 'tap'
import { checkData } from '../../../src/commands/operate/check/data.js'
import { configOf } from '../../../src/config.js'
import { withRecording } from '../../../src/replay/recording.js'
import { CheckpointFiles } from '../../../src/store/checkpoint/checkpoint-files.js'
import { findCheckpoint } from '../../../src/store/checkpoint/checkpoint-source.js'
import { gradientsOf, known, MODEL, type Trace, train, trainStep, undisturbed } from '../../run/trainer.js'
import { RawClient, type Service, startService } from '../../service.js'
import { TestStore } from './stores.js'

type Settings = Parameters<typeof startService>[0]

const store = await TestStore.start(t)
const id = (step: number) => `step-${String(step).padStart(12, '0')}`
const LAST = 12
const start = (settings: Settings) =>
  startService({ checkpoint_steps: 5, checkpoint_file_bytes: 2000, lanes: 1, staging_bytes: 2 ** 20, ...settings })

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})
t.afterEach(() => {
  store.fault = () => undefined
  store.down = false
})

/** A folder has tests of its own: that both do the same is held beside the real store (test/objects/ci.sh). */
const PLACES: Record<string, (t: Test) => Settings> = {
  ...(!store.fake && { 'in a folder': (t: Test) => ({ data: t.testdir({}) }) }),
  'in S3': () => store.settings(store.address()),
}

const api = async ({ http }: Service, path: string, init: RequestInit = {}) => {
  const response = await fetch(`${http}${path}`, init)
  return { status: response.status, body: response.status === 204 ? undefined : await response.json() }
}
const listed = async (service: Service, run = 'r') => {
  const { body } = await api(service, `/v1/runs/${run}/checkpoints`)
  return (body as { checkpoints: { checkpoint: string }[] }).checkpoints.map(({ checkpoint }) => checkpoint)
}
const tag = (service: Service, name: string) =>
  api(service, '/v1/runs/r/checkpoints', {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ tag: name }),
  })

for (const [where, place] of Object.entries(PLACES)) {
  t.test(`a run ${where} goes on after a restart, back to a tag, and on as another run`, async (t) => {
    const settings = place(t)
    const first = await start({ ...settings, checkpoints_kept: 1 })
    const one = await train(first, { last: 6 })
    t.equal((await tag(first, 'six')).status, 201)
    t.equal((await tag(first, 'again')).status, 201)
    for (let step = 7; step <= 11; step++) await trainStep(one.client, step)
    await first.runs.keeper('r').settled()
    t.same(await listed(first), [id(6), id(10)], 'one without a tag is kept')
    await one.client.close()
    await first.drain()
    await first.app.close()

    const second = await start(settings)
    await second.restored
    t.same(second.runs.get('r').digest, reference[10]!.digest)
    t.same(await listed(second), [id(6), id(11)])
    const back = await train(second, { last: 8, open: { mode: 'resume', checkpoint: 'six' } })
    t.same(known(back.traces), known(reference.slice(6, 8)))
    t.same(await listed(second), [id(6)])
    t.equal((await api(second, `/v1/runs/r/checkpoints/again`)).status, 200)
    const branch = await train(second, { run: 'b', last: 7, open: { from: { run: 'r', checkpoint: 'again' } } })
    t.same(known(branch.traces), known(reference.slice(6, 7)))
    await branch.client.close()
    await tag(second, 'eight')
    t.equal((await api(second, `/v1/runs/r/checkpoints/six`, { method: 'DELETE' })).status, 204)
    await back.client.close()
    await second.app.close()

    const third = await start(settings)
    await third.restored
    t.same(third.runs.get('r').digest, reference[7]!.digest)
    t.equal(third.runs.get('b').step, 6, 'its last checkpoint')
    t.same(await listed(third), [id(8)])
    t.equal((await api(third, '/v1/runs/r', { method: 'DELETE' })).status, 204)
    await third.app.close()

    const fourth = await start(settings)
    await fourth.restored
    t.same(
      fourth.runs.list().map(({ name }) => name),
      ['b'],
    )
    const anew = await train(fourth, { last: 1 })
    t.same(known(anew.traces), known(reference.slice(0, 1)), 'its name is free')
    await anew.client.close()
    await fourth.app.close()
  })
}

t.test('a store that is slow holds no step up; one that refuses is told, and the run goes on', async (t) => {
  const service = await start(store.settings(store.address(), 30))
  const { client } = await train(service, { last: 4 })
  let release = () => {}
  const held = new Promise<void>((resolve) => {
    release = resolve
  })
  store.fault = ({ method }) => (method === 'PUT' ? held : undefined)
  const traces = [await trainStep(client, 5), await trainStep(client, 6), await trainStep(client, 7)]
  t.same(known(traces), known(reference.slice(4, 7)))
  t.same(await listed(service), [id(0)], 'the checkpoint of step 5 is on its way')
  release()
  await service.runs.keeper('r').settled()
  t.same(await listed(service), [id(0), id(5)])
  store.fault = ({ method }) => (method === 'PUT' ? 'denied' : undefined)
  const refused = await tag(service, 'seven')
  t.match(refused, {
    status: 507,
    body: { code: 'STORAGE_FAILED', detail: /at step 7 cannot be written: s3:.*403 AccessDenied/ },
  })
  client.send({ type: 'open', protocol: 1, run: 'other', ...MODEL })
  await client.close()
  const opening = await RawClient.connect(service.url)
  opening.send({ type: 'open', protocol: 1, run: 'other', ...MODEL })
  t.match(await opening.expect('error'), {
    code: 'STORAGE_FAILED',
    message: /^run 'other' cannot be kept: s3:.*403 AccessDenied/,
  })
  store.fault = () => undefined
  t.equal((await tag(service, 'seven')).status, 201)
  await opening.open({ run: 'other', ...MODEL })
  await opening.close()
  const text = await service.metrics.registry.metrics()
  t.match(text, /muond_store_requests_total\{operation="put"\} [1-9]/)
  t.match(text, /muond_store_errors_total\{operation="put"\} [1-9]/)
  t.match(text, /muond_store_bytes_total\{operation="put"\} [1-9]\d{3}/, 'the thread counts, too')
  t.match(text, /muond_store_seconds_count\{operation="get"\} [1-9]/)
  await service.app.close()
})

t.test('readiness says that the store does not answer, and a run that cannot be read now is read later', async (t) => {
  const settings = store.settings(store.address(), 0.5)
  const first = await start(settings)
  await (await train(first, { last: 5 })).client.close()
  await first.app.close()
  const second = await start({ ...settings, idle_seconds: 100 })
  await second.restored
  await second.runs.restIdle(performance.now() + 200_000)
  const client = await RawClient.connect(second.url)
  const refused = async () => {
    client.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume' })
    return client.expect('error')
  }
  const denied = { code: 'STORAGE_FAILED', message: /^run 'r' cannot be restored: s3:.* 403 / }
  for (const wanted of ['HEAD', 'GET']) {
    store.fault = ({ method, key }) => (method === wanted && key.includes('state-') ? 'denied' : undefined)
    t.match(await refused(), denied, `${wanted} of a file`)
  }
  store.fault = () => undefined
  store.down = true
  let answer = await api(second, '/readyz')
  while (answer.status === 200) answer = await api(second, '/readyz')
  t.match(answer, {
    status: 503,
    body: { code: 'STORAGE_FAILED', detail: /^data store 's3:.*' cannot be written: (s3:|it has not)/ },
  })
  t.match(await refused(), { code: 'STORAGE_FAILED', message: /^run 'r' cannot be restored: s3:/ })
  store.down = false
  while (answer.status !== 200) answer = await api(second, '/readyz')
  t.match(await client.open({ run: 'r', mode: 'resume' }), { step: 5, digest: reference[4]!.digest })
  await client.close()
  await second.app.close()
})

t.test('one service has the store; of one that is taken to be dead nothing counts any more', async (t) => {
  const address = store.address()
  const first = await start({ ...store.settings(address, 0.5), checkpoint_steps: 0 })
  const { client } = await train(first, { last: 3 })
  await first.runs.keeper('r').take('three')
  const inUse = {
    name: 'ConfigError',
    message: /^data store 's3:.*' is in use by process \d+ on .*: one service at a time/,
  }
  await t.rejects(start(store.settings(address, 0.5)), inUse)
  await t.rejects(start(store.settings(address, 0.5)), inUse, 'it still has it')
  // The first one's signs of life are lost, and nothing else of it.
  store.fault = ({ key, method }) => (method === 'PUT' && key.endsWith('owner.json') ? 'cut' : undefined)
  const other = await store.another(t)
  const second = await start({ ...other.settings(address, 0.5), data_wait_seconds: 60 })
  await second.restored
  store.fault = () => undefined
  t.match(await first.data!.lost, /^it was taken by process/)
  await trainStep(client, 4)
  t.match(await tag(first, 'four'), {
    status: 507,
    body: { detail: /was taken by a service of generation 2, this one has generation 1/ },
  })
  t.equal((await api(first, '/readyz')).status, 503)
  t.equal(second.runs.get('r').digest, reference[2]!.digest)
  const after = await train(second, { last: 4, open: { mode: 'resume' } })
  t.same(known(after.traces), known(reference.slice(3, 4)))
  await after.client.close()
  await client.close()
  await first.app.close()
  await second.app.close()
})

t.test(
  'with a journal every step that was acknowledged is there for the next service, and none comes behind',
  async (t) => {
    const address = store.address()
    const settings = { durability: 'journal', checkpoint_steps: 4 } as const
    const first = await start({ ...store.settings(address, 0.5), ...settings })
    const one = await train(first, { last: 6 })
    t.same(known(one.traces), known(reference.slice(0, 6)))
    t.ok(one.traces.every(({ durable }) => durable))
    // The first one's signs of life are lost, and nothing else of it: it goes on for all that its client knows.
    store.fault = ({ key, method }) => (method === 'PUT' && key.endsWith('owner.json') ? 'cut' : undefined)
    const other = await store.another(t)
    t.same(known([await trainStep(one.client, 7)]), known([reference[6]!]))
    const second = await start({ ...other.settings(address, 0.5), ...settings, data_wait_seconds: 60 })
    await second.restored
    store.fault = () => undefined
    const { step } = second.runs.get('r')
    t.equal(step, 7)
    t.same(second.runs.get('r').digest, reference[6]!.digest)
    for (const [i, values] of gradientsOf(8).entries()) if (values) one.client.gradient(i, 8, { values })
    one.client.send({ type: 'end', step: 8 })
    const refusal = { code: 'STORAGE_FAILED', message: /step 8 is not finished: .* was taken by another service/ }
    t.match(await one.client.expect('error'), refusal)
    const after = await train(second, { last: LAST, open: { mode: 'resume' } })
    t.same(known(after.traces), known(reference.slice(7)))
    for (const each of [one, after]) await each.client.close()
    await first.app.close()
    await second.app.close()
    const third = await start({ ...other.settings(address, 0.5), durability: 'checkpoint' })
    await third.restored
    t.match(third.runs.get('r'), { step: LAST, digest: reference[LAST - 1]!.digest })
    await third.app.close()
  },
)

t.test('muond check probes a store, and tells who has it', async (t) => {
  const settings = store.settings(store.address())
  const check = () => checkData(configOf(settings))
  t.match(await check(), [
    { check: 'data', state: 'ok', found: /^s3:.* of racing writers lets exactly one win; nobody uses it/ },
  ])
  const service = await start(settings)
  t.match(await check(), [{ state: 'warning', found: /; it is in use by process/ }])
  await service.app.close()
  t.match(await check(), [{ state: 'ok', found: /; nobody uses it/ }])
  store.down = true
  t.match(await check(), [{ state: 'error', found: /^s3:/, remedy: /^the bucket must be there/ }])
})

t.test('what reads a folder beside a service says that a store is none', async (t) => {
  const refused = {
    name: 'UnreadableError',
    message: "'s3://b/p' is no folder: ask the service that has it, over REST",
  }
  await t.rejects(findCheckpoint('s3://b/p', 'r'), refused)
  const files = new CheckpointFiles()
  await t.rejects(
    withRecording({ data: 's3://b/p', run: 'r' }, files, async () => {}),
    refused,
  )
  await files.close()
})

t.test('a place that is none is told at once', async (t) => {
  const settings = store.settings(store.address())
  await t.rejects(start({ ...settings, data: 's3://X' }), {
    name: 'ConfigError',
    message: /data is 's3:\/\/X', expected s3:\/\/BUCKET/,
  })
  await t.rejects(start({ ...settings, data: 's3://bucket/a/../b' }), { name: 'ConfigError' })
  await t.rejects(start({ ...settings, durability: 'journal', keep_journal: true }), {
    message: /keep_journal needs a folder as --data/,
  })
  await t.rejects(start({ ...settings, s3_endpoint: 'http://me:secret@x' }), {
    name: 'ConfigError',
    message: "s3_endpoint is 'http://…@x', expected http://HOST:PORT or https://HOST",
  })
  await t.rejects(start({ s3_endpoint: 'http://x' }), { message: /are for --data s3:\/\/BUCKET\/PREFIX, got ''/ })
  store.down = true
  await t.rejects(start(settings), { name: 'ConfigError', message: /^data store 's3:.*' cannot be used: / })
})
