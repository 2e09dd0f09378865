import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { pino } from 'pino'
import t, { type Test } from 'tap'
import { buildApp } from '../../src/app.js'
import { configOf } from '../../src/config.js'
import type { components } from '../../src/http/openapi.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { gradientsOf, known, MODEL, type Trace, train, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, type Service, startService, until } from '../service.js'
import { flip, id, manifestOf, runFolder, start as startIn } from './data-folder.js'

type Summary = components['schemas']['RunSummary']
type Event = { event: string; run?: string; step?: number; durable_step?: number; reason?: string }

const DAY_MS = 86_400_000
const later = () => performance.now() + DAY_MS

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, 4)
  await service.app.close()
})

async function start(t: Test, data: string, settings: Parameters<typeof startIn>[1] = {}): Promise<Service> {
  const service = await startIn(data, { checkpoint_steps: 0, ...settings })
  t.teardown(() => service.app.close())
  await service.restored
  return service
}

/** A service whose log is kept. */
async function logged(t: Test, settings: object): Promise<Service & { events: Event[] }> {
  const events: Event[] = []
  const config = configOf({ device: 'cpu', port: 0, staging_bytes: 2 ** 20, lanes: 1, ...settings })
  const logger = pino({ level: 'info' }, { write: (line: string) => events.push(JSON.parse(line)) })
  const built = await buildApp({ config, logger })
  t.teardown(() => built.app.close())
  const http = await built.app.listen({ port: 0, host: '127.0.0.1' })
  return { ...built, http, url: `${http.replace('http', 'ws')}/v1/stream`, events }
}

async function trained(service: Service, run: string, last: number): Promise<void> {
  await (await train(service, { run, last })).client.close()
  await until(() => !service.runs.get(run).connected)
}

const get = async <T>({ http }: Service, path: string): Promise<T> => (await (await fetch(http + path)).json()) as T
const summaries = async (service: Service) => (await get<{ runs: Summary[] }>(service, '/v1/runs')).runs

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(
    `${durability}: a run that nobody uses leaves memory, and the next open goes on with the same bits`,
    async (t) => {
      const service = await start(t, t.testdir({}), { durability, max_runs: 1 })
      await trained(service, 'r', 2)
      const before = await get<Summary>(service, '/v1/runs/r')
      await service.runs.restIdle(performance.now() + DAY_MS / 2)
      t.equal(service.runs.list().length, 1, 'it is not time yet')
      await service.runs.restIdle(later())
      t.same([service.runs.list(), service.device.admittedBytes, service.device.memory.bytes], [[], 0, 0])
      const idle = { in_memory: false, durable_step: 2 }
      // A process tells of the pace of steps that it has finished itself, and has had in memory since.
      const { last_step_at, step_seconds, ...kept } = before
      t.same(await summaries(service), [{ ...omit(kept), ...idle }])
      t.same(await get(service, '/v1/runs/r'), { ...kept, ...idle })
      t.type(last_step_at, 'string')
      t.type(step_seconds, 'number')
      const after = await train(service, { last: 4, open: { mode: 'resume' } })
      t.match(after.opened, { step: 2, resumed: true, epoch: 2, digest: reference[1]!.digest })
      t.same(known(after.traces), known(reference.slice(2)))
      t.match(await summaries(service), [{ in_memory: true, connected: true }])
      await after.client.close()
    },
  )
}

const omit = ({ ...run }: Summary & { ahead?: unknown; attentions?: unknown; groups?: unknown }): Summary => {
  for (const key of ['ahead', 'attentions', 'groups'] as const) delete run[key]
  return run
}

t.test('for a run that finds no memory others leave that nobody uses, and none where that would not do', async (t) => {
  const data = t.testdir({})
  const before = await startIn(data, { checkpoint_steps: 0 })
  await trained(before, 'r', 2)
  const bytes = before.device.admittedBytes
  await before.runs.restIdle(later())
  await before.app.close()
  const service = await start(t, data, { state_bytes_limit: Math.floor(1.5 * bytes) })
  const names = () => service.runs.list().map(({ name }) => name)
  t.same(names(), ['r'])
  await trained(service, 'other', 1)
  t.same(names(), ['other'])
  const after = await train(service, { last: 4, open: { mode: 'resume' } })
  t.match(after.opened, { step: 2, resumed: true, digest: reference[1]!.digest })
  t.same(known(after.traces), known(reference.slice(2)))
  t.same(names(), ['r'])
  const refusal = async (frame: Pick<OpenFrame, 'run' | 'groups' | 'parameters' | 'mode'>) => {
    const client = await RawClient.connect(service.url)
    client.send({ type: 'open', protocol: 1, ...frame })
    const error = await client.expect('error')
    await client.close()
    return error
  }
  const refused = (run: string) => ({ code: 'OVER_CAPACITY', message: new RegExp(`run '${run}' needs \\d+ bytes`) })
  t.match(await refusal({ ...MODEL, run: 'other', mode: 'resume' }), refused('other'), 'a connection has the other one')
  await after.client.close()
  await until(() => !service.runs.get('r').connected)
  const parameters = [{ name: 'w', shape: [bytes], group: 'g' }]
  const groups = [{ name: 'g', algorithm: 'sgd' }]
  t.match(await refusal({ run: 'large', groups, parameters }), refused('large'))
  t.same(names(), ['r'], 'nobody leaves in vain')
})

t.test('what has a connection, or state on its way in, stays', async (t) => {
  const service = await start(t, t.testdir({}), { max_runs: 2 })
  const { client } = await train(service, { last: 1 })
  await service.runs.restIdle(later())
  t.equal(service.runs.list().length, 1)
  await client.close()
  const run = service.runs.get('r')
  await until(() => !run.connected)
  await service.runs.import(run, () => service.runs.restIdle(later()))
  t.equal(service.runs.list().length, 1)
  // An import that begins while the last checkpoint is written.
  const keeper = service.runs.keeper('r')
  const take = keeper.take.bind(keeper)
  let importing: Promise<void> | undefined
  let finish = () => {}
  keeper.take = async (tag) => {
    importing = service.runs.import(
      run,
      () =>
        new Promise<void>((resolve) => {
          finish = resolve
        }),
    )
    return take(tag)
  }
  await service.runs.restIdle(later())
  t.equal(service.runs.list().length, 1)
  finish()
  await importing
  keeper.take = take
  await service.runs.restIdle(later())
  t.equal(service.runs.list().length, 0)
})

t.test('reading brings an idle run back, listing does not', async (t) => {
  const service = await start(t, t.testdir({}))
  await trained(service, 'r', 2)
  const paths = ['/state', '/parameters', '/parameters/0', '/parameters/0/state', '/receipts', '/checkpoints']
  // What was measured of the last step goes with the memory.
  const bodyOf = async (answer: Response) =>
    Buffer.from(await answer.arrayBuffer())
      .toString('latin1')
      .replace(/,"last":\{"gradient_norm":[^}]*\}/g, '')
  const answers = async () =>
    Promise.all(paths.map(async (path) => bodyOf(await fetch(`${service.http}/v1/runs/r${path}`))))
  const receipts = paths.indexOf('/receipts')
  await service.runs.keeper('r').take()
  const before = await answers()
  for (const [i, path] of paths.entries()) {
    await service.runs.restIdle(later())
    t.equal(service.runs.list().length, 0)
    const answer = await fetch(`${service.http}/v1/runs/r${path}`)
    t.equal(answer.status, 200)
    const body = await bodyOf(answer)
    if (i !== receipts) t.ok(body === before[i], path)
    t.equal(service.runs.list().length, 1)
  }
  await service.runs.restIdle(later())
  t.match(await get(service, '/v1/runs/r/events'), {
    code: 'RESTORING',
    detail: /^run 'r' is idle and on the disk: an open/,
  })
  const post = await fetch(`${service.http}/v1/runs/r/checkpoints`, {
    method: 'POST',
    body: '{"tag":"x"}',
    headers: { 'content-type': 'application/json' },
  })
  t.match(await post.json(), { checkpoint: id(2), tags: ['x'] })
  await service.runs.restIdle(later())
  t.equal((await fetch(`${service.http}/v1/runs/r/checkpoints/${id(0)}`, { method: 'DELETE' })).status, 204)
  await service.runs.restIdle(later())
  t.equal((await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })).status, 204)
  t.same(await summaries(service), [])
})

t.test('an event stream of a run that leaves memory ends', async (t) => {
  const service = await start(t, t.testdir({}))
  await trained(service, 'r', 1)
  const events = await fetch(`${service.http}/v1/runs/r/events`)
  await service.runs.restIdle(later())
  t.equal(await events.text(), '')
})

t.test('a run in the middle of a step leaves for time only, and comes back where a crash would leave it', async (t) => {
  for (const durability of ['checkpoint', 'journal'] as const) {
    const service = await logged(t, { data: t.testdir({}), durability, checkpoint_steps: 0, max_runs: 1 })
    const { client } = await train(service, { last: 2 })
    client.gradient(0, 3, { values: gradientsOf(3)[0]! })
    const run = service.runs.get('r')
    await until(() => run.ahead.length === 1)
    await client.close()
    await until(() => !run.connected)
    const other = await RawClient.connect(service.url)
    other.send({ type: 'open', protocol: 1, run: 'other', ...MODEL })
    if (durability === 'checkpoint') t.match(await other.expect('error'), { code: 'OVER_CAPACITY' })
    else t.match(await other.expect('opened'), { run: 'other' }, 'the journal has every finished step')
    await other.close()
    await service.runs.restIdle(later())
    const durable_step = durability === 'journal' ? 2 : 0
    const left = service.events.find(({ event, run }) => event === 'run_left_memory' && run === 'r')
    t.match(left, durability === 'journal' ? { step: 2 } : { step: 2, durable_step })
    t.match(service.runs.idle.get('r'), { step: durable_step, durable_step })
    const again = await train(service, { last: 3, open: { mode: 'resume' } })
    t.match(again.opened, { step: durable_step, ahead: [] })
    t.same(known(again.traces), known(reference.slice(durable_step, 3)))
    await again.client.close()
  }
})

t.test('a run that the disk cannot take stays in memory, and a newcomer is refused', async (t) => {
  const data = t.testdir({})
  const service = await logged(t, { data, checkpoint_steps: 0, max_runs: 1 })
  await trained(service, 'r', 1)
  writeFileSync(join(runFolder(data), 'checkpoints', id(1)), '')
  await service.runs.restIdle(later())
  t.match(
    service.events.filter(({ event }) => event === 'idle_run_stays'),
    [{ run: 'r', step: 1, reason: /EEXIST/ }],
  )
  const other = await RawClient.connect(service.url)
  other.send({ type: 'open', protocol: 1, run: 'other', ...MODEL })
  t.match(await other.expect('error'), {
    code: 'OVER_CAPACITY',
    message: /^the service holds 1 runs, at most 1: delete one/,
  })
  rmSync(join(runFolder(data), 'checkpoints', id(1)))
  t.match(await other.open({ run: 'other', ...MODEL }), { resumed: false })
  t.match(service.runs.idle.get('r'), { step: 1 })
  await other.close()
})

t.test('at max_runs the run leaves that has been without a connection for the longest time', async (t) => {
  const service = await start(t, t.testdir({}), { max_runs: 3 })
  for (const run of ['a', 'b', 'c']) await trained(service, run, 1)
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'a', mode: 'resume' })
  const names = () =>
    service.runs
      .list()
      .map(({ name }) => name)
      .sort()
  await trained(service, 'd', 1)
  t.same(names(), ['a', 'c', 'd'])
  await trained(service, 'e', 1)
  t.same(names(), ['a', 'd', 'e'])
  await client.close()
  await until(() => !service.runs.get('a').connected)
  // Reading a run's state brings it back as an open does.
  t.equal((await fetch(`${service.http}/v1/runs/b/state`)).status, 200)
  t.same(names(), ['a', 'b', 'e'])
  t.same([...service.runs.idle.keys()].sort(), ['c', 'd'])
})

t.test('never more than max_runs are in memory, also where many come side by side', async (t) => {
  for (const settings of [{ data: t.testdir({}) }, {}]) {
    const service = await startService({ max_runs: 3, lanes: 1, ...settings })
    const clients = await Promise.all(Array.from({ length: 8 }, () => RawClient.connect(service.url)))
    for (const [i, client] of clients.entries()) client.send({ type: 'open', protocol: 1, run: `r${i}`, ...MODEL })
    let most = 0
    const watch = setInterval(() => {
      most = Math.max(most, service.runs.list().length)
    }, 1)
    const answers = await Promise.all(clients.map((client) => client.next()))
    clearInterval(watch)
    t.equal(answers.filter(({ type }) => type === 'opened').length, 3)
    t.match(
      answers.filter(({ type }) => type === 'error'),
      Array(5).fill({ code: 'OVER_CAPACITY' }),
    )
    t.ok(most <= 3)
    for (const client of clients) await client.close()
    await service.app.close()
  }
})

t.test('a start brings back as many runs as there is room for, and describes the others', async (t) => {
  const data = t.testdir({})
  const first = await start(t, data, { durability: 'journal' })
  for (const run of ['a', 'b', 'c']) await trained(first, run, 2)
  await first.runs.keeper('c').take()
  const bytes = first.device.admittedBytes / 3
  await first.app.close()
  const second = await start(t, data, { max_runs: 1, durability: 'journal' })
  t.same(
    second.runs.list().map(({ name }) => name),
    ['a'],
  )
  t.match(await summaries(second), [
    { name: 'a', in_memory: true, step: 2, durable_step: 2 },
    { name: 'b', in_memory: false, step: 0, parameters: MODEL.parameters.length, epoch: 1 },
    { name: 'c', in_memory: false, step: 2, digest: reference[1]!.digest },
  ])
  t.match(await get(second, '/v1/runs/b'), {
    attentions: [{ name: 'a' }],
    groups: { sgd: { algorithm: 'sgd' } },
    ahead: [],
  })
  t.match(await get(second, '/v1/runs'), { stored: [] })
  t.equal((await fetch(`${second.http}/readyz`)).status, 200)
  const back = await train(second, { run: 'b', last: 3, open: { mode: 'resume' } })
  t.match(back.opened, { step: 2 })
  t.same(known(back.traces), known(reference.slice(2, 3)))
  await back.client.close()
  await second.app.close()
  // Memory for one run only.
  const third = await start(t, data, { state_bytes_limit: Math.ceil(1.5 * bytes), durability: 'journal' })
  t.same(
    third.runs.list().map(({ name }) => name),
    ['a'],
  )
  t.same([...third.runs.idle.keys()], ['b', 'c'])
  await third.app.close()
  flip(manifestOf(data, 2).replace('/r/', '/c/'), 30)
  const fourth = await start(t, data, { max_runs: 1 })
  t.match(await get(fourth, '/v1/runs'), { stored: [{ name: 'c', status: 'unreadable', detail: /SHA-256/ }] })
})

t.test('without a data folder a run that nobody uses ends, and says before when', async (t) => {
  const service = await startService({ idle_seconds: 90, lanes: 1 })
  t.teardown(() => service.app.close())
  const client = await RawClient.connect(service.url)
  t.match(await client.open({ run: 'r', ...MODEL }), { limits: { idle_seconds: 90 } })
  await trainStep(client, 1)
  await client.close()
  await until(() => !service.runs.get('r').connected)
  await service.runs.restIdle(performance.now() + 89_000)
  t.equal(service.runs.list().length, 1)
  await service.runs.restIdle(performance.now() + 91_000)
  t.same([service.runs.list(), service.device.admittedBytes, service.device.memory.bytes], [[], 0, 0])
  t.match(await get(service, '/v1/runs/r'), {
    code: 'RUN_NOT_FOUND',
    detail: "there is no run 'r'; without a data folder one ends after 90 seconds without a connection",
  })
})

t.test('the service itself looks for runs that nobody uses, and never where that is switched off', async (t) => {
  const service = await start(t, t.testdir({}), { idle_seconds: 0.02 })
  await (await train(service, { last: 1 })).client.close()
  await until(() => service.runs.idle.has('r'))
  const never = await start(t, t.testdir({}), { idle_seconds: 0 })
  await trained(never, 'r', 1)
  await never.runs.restIdle(later())
  t.equal(never.runs.list().length, 1)
})

t.test('whoever waits for a run that leaves memory is told so', async (t) => {
  const service = await start(t, t.testdir({}))
  await trained(service, 'r', 1)
  const run = service.runs.get('r')
  const keeper = service.runs.keeper('r')
  await service.runs.restIdle(later())
  const gone = { code: 'RESTORING', message: "run 'r' has left memory meanwhile: ask again" }
  await t.rejects(keeper.take(), gone)
  await t.rejects(
    keeper.alone(async () => {}),
    gone,
  )
  t.throws(() => run.checkBetween('it is read'), gone)
  service.runs.draining = true
  await t.rejects(service.runs.wake('r'), { code: 'DRAINING' })
  await turn()
})

t.test('a shutdown waits for a run that is about to leave memory, which then stays', async (t) => {
  const data = t.testdir({})
  const service = await startIn(data, { checkpoint_steps: 0 })
  await trained(service, 'r', 1)
  const keeper = service.runs.keeper('r')
  const take = keeper.take.bind(keeper)
  let closing: Promise<void> | undefined
  keeper.take = (tag) => {
    closing = service.app.close()
    return take(tag)
  }
  await service.runs.restIdle(later())
  t.equal(service.runs.list().length, 1)
  await closing
  const again = await start(t, data)
  t.match(again.runs.get('r'), { step: 1, digest: reference[0]!.digest }, 'the checkpoint was taken')
})
