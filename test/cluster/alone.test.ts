import { readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { type AddressInfo, createServer as createTcpServer } from 'node:net'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { type Client, connect } from '../../src/client/client.js'
import { openCheckpoints, sealCheckpoints } from '../../src/cluster/head/whole-texts.js'
import { Calls } from '../../src/cluster/peers/calls.js'
import { Peers } from '../../src/cluster/peers/peers.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import { gradientsOf, modelOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { CLUSTER_KEY, type Process, type Settings, startCluster, wholeOf } from './service.js'

// A process that has no others, or had none or others before, and one whose files or peers are not what they were.

const ONCE = { ...QUICK, retries: 0 }

async function clientOf(t: Test, { url }: Process): Promise<Client> {
  const client = await connect(url, ONCE)
  t.teardown(() => client.close())
  return client
}

/** The settings of a process that has no others. */
const ALONE = { peers: '', advertise: '', cluster_key: '' }

/** The first text of its kind for which something holds: who is the head of a run depends on its name and the ports. */
function firstOf(text: (i: number) => string, holds: (text: string) => boolean): string {
  for (let i = 0; ; i++) if (holds(text(i))) return text(i)
}

const problem = async (response: Response) => (await response.json()) as { code: string; detail: string }

/** Sends a vote that its schema takes; its step is one that no run has come to. */
function vote({ peer }: Process, run: string): Promise<Response> {
  const receipt = {
    ...{ step: 9, replayed: false, applied: 0, skipped: 1, gradient_norm: 0, groups: {}, clipped_heads: {} },
    ...{ digest: FIRST_DIGEST, durable: false, seconds: { receive: 0, queue: 0, compute: 0, send: 0 } },
  }
  const body = { generation: 1, shard: 0, step: 9, records: 'AA==', receipt }
  const headers = { 'content-type': 'application/json', authorization: `Bearer ${CLUSTER_KEY}` }
  return fetch(`${peer}/v1/runs/${run}/votes`, { method: 'POST', headers, body: JSON.stringify(body) })
}

t.test('a service without peers opens no shards, and counts no votes', async (t) => {
  const [service] = (await startCluster(t, 1, ALONE)) as [Process]
  const client = await clientOf(t, service)
  const model = modelOf('gpt')
  await t.rejects(client.open({ ...model, shards: 2 }), {
    code: 'PARAMETER_INVALID',
    message: /run 'gpt' asks for 2 shards: this service has no peers/,
  })
  await t.rejects(client.open({ ...model, run: 'gpt~0' }), {
    code: 'PARAMETER_INVALID',
    message: /'gpt~0' is a shard of a run: this service has no peers/,
  })
  t.equal((await client.open({ ...model, shards: 1 })).step_count, 0)
  t.match(await problem(await fetch(`${service.peer}/v1/runs/gpt/shards`)), { code: 'NOT_FOUND' })
  t.equal((await vote(service, 'gpt')).ok, false)
})

t.test('a run that was made before there were peers stays where it is', async (t) => {
  const processes = await startCluster(t, 2, { keeps: true, checkpoint_steps: 0 })
  const [home, other] = processes as [Process, Process]
  await home.stop()
  await home.start(ALONE)
  const peers = new Peers([home.peer, other.peer], home.peer)
  const name = firstOf(
    (i) => `run-${i}`,
    (run) => peers.headOf(run) === other.peer,
  )
  const model = modelOf(name)
  const client = await clientOf(t, home)
  await (await client.open(model)).step(gradientsOf(model.parameters, 1))
  await home.app.drain()
  await home.start()
  await home.app.restored
  const again = await clientOf(t, home)
  t.match(await again.open({ ...model, shards: 2 }), { step_count: 1 })
  t.same(other.app.runs.list(), [])
  t.match(await problem(await vote(home, name)), { code: 'RUN_NOT_FOUND' })
})

t.test('the service chooses so many shards as it is set to, or as the run can be cut into', async (t) => {
  const processes = await startCluster(t, 2, { shards: 4 })
  const client = await clientOf(t, processes[0]!)
  const shardsOf = async (name: string) => (await wholeOf(processes, name)).body.shards.map(({ peer }) => peer)
  const open = (name: string, count: number) => {
    const { parameters, groups } = modelOf(name)
    return client.open({ run: name, groups, parameters: parameters.slice(0, count) })
  }
  await open('five', 5)
  const four = await shardsOf('five')
  t.equal(four.length, 4)
  t.equal(new Set(four).size, 2, 'they go around')
  await open('three', 3)
  t.equal((await shardsOf('three')).length, 3)
  await open('one', 1)
  await t.rejects(shardsOf('one'), 'a run of one shard is one of its process alone')
  const wrong = client.open({ run: 'wrong', groups: [], parameters: modelOf('wrong').parameters })
  await t.rejects(wrong, { code: 'PARAMETER_INVALID' })
})

/** A whole of one step that is kept, its head, and the files of that. */
async function kept(t: Test, settings: Settings = {}) {
  const processes = await startCluster(t, 2, { keeps: true, ...settings })
  const client = await clientOf(t, processes[0]!)
  const model = modelOf('gpt')
  const run = await client.open({ ...model, shards: 2 })
  await run.step(gradientsOf(model.parameters, 1))
  const { head } = await wholeOf(processes, 'gpt')
  const files = join(head.data, 'wholes', 'gpt')
  return { processes, client, run, model, head, files }
}

t.test('a whole whose log is damaged is opened by nobody, and its name is not free', async (t) => {
  const { head, files, client, model } = await kept(t)
  await head.stop()
  const log = join(files, 'log.jsonl')
  const damaged = readFileSync(log, 'utf8').replace(/.{9}\n$/, '\n')
  writeFileSync(log, damaged)
  await head.start()
  await t.rejects(client.open({ ...model, shards: 2 }), { code: 'CHECKPOINT_UNREADABLE', message: /run 'gpt' in '/ })
  t.match(await problem(await fetch(`${head.peer}/v1/runs/gpt/shards`)), { code: 'CHECKPOINT_UNREADABLE' })
  t.match(await problem(await vote(head, 'gpt')), { code: 'CHECKPOINT_UNREADABLE' })
  t.equal(readFileSync(log, 'utf8'), damaged, 'what is there is left as it is')
})

t.test('a whole goes back past no line of its log that is damaged', async (t) => {
  const { head, files, run, model } = await kept(t, { durability: 'journal' })
  await run.checkpoint({ tag: 'first' })
  await run.step(gradientsOf(model.parameters, 2))
  const { digest } = run
  await head.stop()
  const log = join(files, 'log.jsonl')
  const [begun, first, ...later] = readFileSync(log, 'utf8').split('\n')
  writeFileSync(log, [begun, first!.replace('{', '['), ...later].join('\n'))
  await head.start()
  await run.reopen()
  t.match(run, { step_count: 2, digest }, 'the newest entry is enough to go on')
  await t.rejects(run.reopen({ checkpoint: 'first' }), { code: 'CHECKPOINT_UNREADABLE', message: /log.jsonl'/ })
})

t.test('of the checkpoints without a tag the newest thousand are known', async (t) => {
  const { head, files, run, processes } = await kept(t)
  await run.checkpoint()
  await run.checkpoint({ tag: 'best' })
  const path = join(files, 'checkpoints.json')
  const read = () => openCheckpoints(readFileSync(path, 'utf8'), path)
  const [untagged, tagged] = read()
  t.match(tagged, { tag: 'best', step: 1, digest: run.digest })
  await Promise.all(processes.map((process) => process.app.drain()))
  for (const process of processes) await process.stop()
  const older = Array.from({ length: 999 }, (_, i) => ({ ...untagged!, checkpoint: `older-${i}` }))
  writeFileSync(path, sealCheckpoints([tagged!, ...older, untagged!]))
  for (const process of processes) await process.start()
  await run.reopen()
  const { checkpoint } = await run.checkpoint()
  const names = read().map((one) => one.checkpoint)
  t.same(
    names,
    [tagged, ...older.slice(1), untagged, { checkpoint }].map((one) => one!.checkpoint),
  )
  t.equal((await wholeOf(processes, 'gpt')).head, head)
})

t.test('a process does not start with other peers than those that its wholes were made with', async (t) => {
  const { head, processes } = await kept(t)
  const other = processes.find((process) => process !== head)!
  await head.stop()
  const third = 'http://127.0.0.1:1'
  const start = (...peers: string[]) => head.start({ peers: peers.join(',') })
  await t.rejects(start(head.peer, third), {
    name: 'ConfigError',
    message: new RegExp(`run 'gpt' of the data folder has a shard at ${other.peer}: start with the peers`),
  })
  const another = firstOf(
    (i) => `http://peer-${i}`,
    (url) => new Peers([head.peer, other.peer, url], head.peer).headOf('gpt') === url,
  )
  await t.rejects(start(head.peer, other.peer, another), {
    name: 'ConfigError',
    message: /has its head here, and by these peers that is http:/,
  })
  await head.start()
  t.equal((await wholeOf(processes, 'gpt')).body.run, 'gpt')
})

t.test('an answer of another process that is cut off, or is none, is told as its fault', async (t) => {
  const ends = createServer((_, reply) => {
    reply.writeHead(200, { 'content-length': '100' }).write('{"run":')
    reply.socket!.end()
  })
  const speaks = createServer((request, reply) => reply.writeHead(request.method === 'GET' ? 200 : 502).end('<html>'))
  const hangsUp = createTcpServer((socket) => socket.destroy())
  const at = async (server: typeof hangsUp) => {
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    t.teardown(() => server.close())
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  }
  const calls = new Calls(CLUSTER_KEY)
  const cutOff = { code: 'PEER_FAILED', message: /an answer of the process http:.* was cut off: / }
  await t.rejects(calls.readWhole(await at(ends), 'gpt'), cutOff)
  const proxy = await at(speaks)
  await t.rejects(calls.readWhole(proxy, 'gpt'), cutOff)
  await t.rejects(calls.checkpoint(proxy, 'gpt~0', undefined), {
    code: 'PEER_FAILED',
    message: /answers with HTTP status 502/,
  })
  await t.rejects(calls.remove(await at(hangsUp), 'gpt~0'), { code: 'PEER_FAILED', message: /does not answer: / })
})
