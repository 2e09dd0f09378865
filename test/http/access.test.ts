import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { type IncomingMessage, request } from 'node:http'
import { join } from 'node:path'
import { pino } from 'pino'
import t, { type Test } from 'tap'
import { WebSocket } from 'ws'
import { parse } from 'yaml'
import { SCOPES, type Scope } from '../../src/access/principal.js'
import { buildApp } from '../../src/app.js'
import { configOf } from '../../src/config.js'
import { bearer, keyOf, keysFile } from './keys.js'
import { connect, GRADIENTS, MODEL, openRun, startService } from './service.js'

const ALL = [...SCOPES]
/** `root` has all runs, alice and bob those of their names, and a key named as a scope has that one only. */
const KEYS = [
  { name: 'root', scopes: ALL },
  { name: 'alice', scopes: ALL, runs: 'alice-' },
  { name: 'bob', scopes: ALL, runs: 'bob-' },
  { name: 'nothing', scopes: [] },
  ...ALL.map((scope) => ({ name: scope, scopes: [scope], runs: 'alice-' })),
]

/** What a route is held to here; `any` takes a key whatever its scopes. The test asks for a row for each operation. */
type Row = { takes: 'open' | 'any' | 'cluster' | Scope; allRuns?: true; status: number; body?: string; type?: string }
const JSON_BODY = { type: 'application/json', body: '{}' }
const TABLE: Readonly<Record<string, Row>> = {
  getRoot: { takes: 'open', status: 200 },
  getLivez: { takes: 'open', status: 200 },
  getReadyz: { takes: 'open', status: 200 },
  getOpenapi: { takes: 'open', status: 200 },
  getAsyncapi: { takes: 'open', status: 200 },
  getDocs: { takes: 'open', status: 200 },
  getUi: { takes: 'open', status: 200 },
  getMetrics: { takes: 'read', allRuns: true, status: 200 },
  getCapabilities: { takes: 'any', status: 200 },
  listRuns: { takes: 'read', status: 200 },
  getRun: { takes: 'read', status: 200 },
  listParameters: { takes: 'read', status: 200 },
  getParameter: { takes: 'read', status: 200 },
  getParameterState: { takes: 'read', status: 200 },
  getState: { takes: 'read', status: 200 },
  putState: { takes: 'checkpoint', status: 400, type: 'application/octet-stream', body: 'no safetensors' },
  openRun: { takes: 'step', status: 400, ...JSON_BODY },
  postStep: { takes: 'step', status: 400, type: 'application/octet-stream', body: 'no safetensors' },
  getShards: { takes: 'read', status: 404 },
  getVotes: { takes: 'cluster', status: 404 },
  postVote: { takes: 'cluster', status: 400, ...JSON_BODY },
  listReceipts: { takes: 'read', status: 200 },
  listRefusals: { takes: 'read', status: 200 },
  streamEvents: { takes: 'read', status: 200 },
  listCheckpoints: { takes: 'read', status: 200 },
  createCheckpoint: { takes: 'checkpoint', status: 201, ...JSON_BODY },
  getCheckpoint: { takes: 'read', status: 200 },
  deleteCheckpoint: { takes: 'checkpoint', status: 422 },
  openStream: { takes: 'step', status: 426 },
  deleteRun: { takes: 'admin', status: 204 },
}

type Operation = { id: string; method: string; path: string }
const { paths } = parse(readFileSync('openapi.yaml', 'utf8'))
const OPERATIONS: Operation[] = Object.entries<Record<string, { operationId: string }>>(paths).flatMap(
  ([path, { parameters: _, ...operations }]) =>
    Object.entries(operations).map(([method, { operationId }]) => ({
      ...{ id: operationId, method: method.toUpperCase(), path },
    })),
)
const rank = ({ id }: Operation) => Object.keys(TABLE).indexOf(id)
/** As the table has them: what deletes comes last. */
const IN_ORDER = OPERATIONS.sort((one, other) => rank(one) - rank(other))

const pathOf = ({ path }: Operation, run: string) =>
  path.replace('{run}', run).replace('{index}', '0').replace('{checkpoint}', 'first') +
  (path.endsWith('/steps') ? '?step=1' : '')

type Answer = { status: number; text: string }

/** An answer; of an event stream its head only. */
async function ask(
  url: string,
  { operation, run = 'alice-1', headers = {} }: { operation: Operation; run?: string; headers?: object },
): Promise<Answer> {
  const { type, body } = TABLE[operation.id]!
  const outgoing = request(`${url}${pathOf(operation, run)}`, {
    method: operation.method,
    headers: { ...headers, ...(type && { 'content-type': type }) },
    agent: false,
  })
  outgoing.on('error', () => {})
  outgoing.end(body)
  const [response] = (await once(outgoing, 'response')) as [IncomingMessage]
  const status = Number(response.statusCode)
  const isEndless = response.headers['content-type'] === 'text/event-stream'
  const text = isEndless ? '' : Buffer.concat(await response.toArray()).toString()
  outgoing.destroy()
  return { status, text }
}

/** A service with a run of alice's and one of bob's, each with a checkpoint `first`. */
async function twoTenants(test: Test, settings: object = {}) {
  const file = keysFile(test, KEYS)
  const data = join(file.path, '..', 'data')
  const service = await startService(test, {
    ...{ keys_file: file.path, data, max_refusals_per_minute: 100_000, receipts_kept: 10 },
    ...settings,
  })
  for (const name of ['alice', 'bob']) {
    const trainer = await openRun(service.url, `${name}-1`, { headers: bearer(name) })
    await trainer.step(1, GRADIENTS)
    trainer.send({ type: 'checkpoint', tag: 'first' })
    await trainer.next('checkpointed')
    trainer.socket.close()
    await once(trainer.socket, 'close')
  }
  return { ...service, file }
}

t.test('every operation of the contract is in the table, and says itself which key it takes', async (t) => {
  t.same(new Set(OPERATIONS.map(({ id }) => id)), new Set(Object.keys(TABLE)))
  for (const { id, method, path } of OPERATIONS) {
    const { security, 'x-all-runs': allRuns } = paths[path][method.toLowerCase()]
    const { takes, allRuns: expected } = TABLE[id]!
    t.same(security, takes === 'open' ? [] : [{ bearer: takes === 'any' ? [] : [takes] }], id)
    t.equal(allRuns, expected, id)
  }
})

/** What the processes of a cluster show each other: it reads, keeps and deletes shards, and trains nothing. */
const CLUSTER = { authorization: 'Bearer the-key-of-the-cluster' }
const OF_CLUSTER = {
  peers: 'http://127.0.0.1:1',
  advertise: 'http://127.0.0.1:1',
  cluster_key: 'the-key-of-the-cluster',
}

t.test('every route answers every principal as it should', async (t) => {
  const { url } = await twoTenants(t, OF_CLUSTER)
  for (const operation of IN_ORDER) {
    const { takes, allRuns, status } = TABLE[operation.id]!
    const isOpen = takes === 'open'
    const hasRun = operation.path.includes('{run}')
    const label = (who: string) => `${operation.method} ${operation.path} by ${who}`
    const none = await ask(url, { operation })
    t.equal(none.status, isOpen ? status : 401, label('nobody'))
    const wrong = await ask(url, { operation, headers: bearer('nobody') })
    t.equal(wrong.status, isOpen ? status : 401, label('a wrong key'))
    const foreign = await ask(url, { operation, headers: { ...bearer('root'), origin: 'https://evil.example' } })
    t.equal(foreign.status, 403, label('a page of another origin'))
    for (const scope of ['nothing', ...ALL]) {
      const answer = await ask(url, { operation, run: 'alice-none', headers: bearer(scope) })
      const passes = isOpen || takes === 'any' || (takes === scope && !allRuns)
      const expected = passes ? (hasRun ? 404 : status) : 403
      t.equal(answer.status, expected, label(`the scope ${scope}`))
      if (answer.status === 403 && takes !== scope) t.match(answer.text, `the scope ${takes}; this one has`)
    }
    const ofCluster = await ask(url, { operation, run: 'alice-none', headers: CLUSTER })
    t.equal(
      ofCluster.status,
      takes === 'step' ? 403 : hasRun && takes !== 'cluster' ? 404 : status,
      label('the cluster'),
    )
    if (takes === 'cluster') {
      const refused = await ask(url, { operation, headers: bearer('root') })
      t.match(refused, { status: 403, text: 'the scope cluster; this one has step, read, checkpoint, admin' })
      continue
    }
    if (hasRun) {
      const [theirs, nowhere, own] = await Promise.all(
        ['alice-1', 'alice-none', 'bob-none'].map((run) => ask(url, { operation, run, headers: bearer('bob') })),
      )
      t.equal(theirs!.status, 404, label("another tenant's prefix"))
      t.equal(theirs!.text.replaceAll('alice-1', 'bob-none'), own!.text, label('a tenant, of a run that is not there'))
      t.equal(theirs!.text.replaceAll('alice-1', 'alice-none'), nowhere!.text)
    }
    const [right, other] = allRuns ? ['root', 'alice'] : ['alice', undefined]
    if (other) t.match(await ask(url, { operation, headers: bearer(other) }), { status: 403, text: /for all runs/ })
    t.equal((await ask(url, { operation, headers: bearer(right!) })).status, status, label('the right key'))
  }
})

t.test('lists have the runs of the key only, in memory, idle and unreadable ones', async (t) => {
  const { url, runs, file } = await twoTenants(t, { max_runs: 1 })
  t.same([runs.list().map(({ name }) => name), [...runs.idle.keys()]], [['bob-1'], ['alice-1']])
  const namesFor = async (key: string) => {
    const response = await fetch(`${url}/v1/runs`, { headers: bearer(key) })
    const { runs, stored } = (await response.json()) as Record<'runs' | 'stored', { name: string }[]>
    return [...runs, ...stored].map(({ name }) => name).sort()
  }
  t.same(await namesFor('root'), ['alice-1', 'bob-1'])
  t.same(await namesFor('alice'), ['alice-1'])
  t.same(await namesFor('bob'), ['bob-1'])
  file.write([{ name: 'root', scopes: ALL }])
})

type Frames = Awaited<ReturnType<typeof openRun>>

/** The code of the next error that a stream gets. */
const refused = async (trainer: Frames, frame: Parameters<Frames['send']>[0]) => {
  trainer.send(frame)
  return trainer.next('error')
}

const stream = (url: string, key: string) => connect(url, { headers: bearer(key) })

t.test(
  'a stream opens with the scope step, and its frames are held to the scopes and the prefix of the key',
  async (t) => {
    const { url } = await twoTenants(t)
    const status = async (headers: Record<string, string>) => {
      const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, { headers })
      socket.on('error', () => {})
      const [, response] = await once(socket, 'unexpected-response')
      socket.terminate()
      return response.statusCode
    }
    t.equal(await status({}), 401)
    t.equal(await status(bearer('nobody')), 401)
    for (const scope of ['read', 'checkpoint', 'admin']) t.equal(await status(bearer(scope)), 403, scope)
    t.equal(await status({ ...bearer('step'), origin: 'https://evil.example' }), 403)

    const trainer = await stream(url, 'step')
    const open = { type: 'open', protocol: 1, ...MODEL } as const
    t.match(await refused(trainer, { ...open, run: 'alice-1', checkpoint: 'first' }), {
      code: 'FORBIDDEN',
      message: "an 'open' with 'checkpoint' takes a key with the scope checkpoint; this one has step",
    })
    t.match(await refused(trainer, { ...open, run: 'alice-2', from: { run: 'alice-1', checkpoint: 'first' } }), {
      code: 'FORBIDDEN',
    })
    trainer.send({ ...open, run: 'alice-2' })
    await trainer.next('opened')
    t.match(await trainer.step(1, GRADIENTS), { step: 1 })
    t.match(await refused(trainer, { type: 'checkpoint' }), {
      code: 'FORBIDDEN',
      message: "a frame 'checkpoint' takes a key with the scope checkpoint; this one has step",
    })
    t.match(await trainer.step(2, GRADIENTS), { step: 2 }, 'the connection stays')
    trainer.socket.close()

    const bob = await stream(url, 'bob')
    const cases = [
      ['create', { ...open, run: 'alice-1', mode: 'create' }, 'FORBIDDEN'],
      ['create or resume', { ...open, run: 'alice-1' }, 'FORBIDDEN'],
      ['resume', { ...open, run: 'alice-1', mode: 'resume' }, 'RUN_NOT_FOUND'],
      ['go back', { ...open, run: 'alice-1', checkpoint: 'first' }, 'RUN_NOT_FOUND'],
      [
        'begin a run of its own at',
        { ...open, run: 'bob-2', from: { run: 'alice-1', checkpoint: 'first' } },
        'RUN_NOT_FOUND',
      ],
      ['take over', { ...open, run: 'alice-1', takeover: true }, 'FORBIDDEN'],
    ] as const
    for (const [title, frame, code] of cases) {
      const theirs = await refused(bob, frame)
      t.equal(theirs.code, code, title)
      const none = await refused(bob, JSON.parse(JSON.stringify(frame).replaceAll('alice-1', 'alice-none')))
      t.same(
        { ...theirs, message: theirs.message.replaceAll('alice-1', 'alice-none') },
        none,
        `${title}: as if there were none`,
      )
    }
    bob.socket.close()
  },
)

t.test('a removed key closes what was opened with it, and other keys do not notice', async (t) => {
  const service = await twoTenants(t)
  const { url, file } = service
  const alice = await openRun(url, 'alice-1', { headers: bearer('alice') })
  const bob = await openRun(url, 'bob-1', { headers: bearer('bob') })
  const events = request(`${url}/v1/runs/alice-1/events`, { headers: bearer('alice'), agent: false }).end()
  const [response] = (await once(events, 'response')) as [IncomingMessage]
  const cut = once(response, 'error')
  const closed = once(alice.socket, 'close')
  file.write(KEYS.filter(({ name }) => name !== 'alice'))
  t.same(service.reload(), { keys: KEYS.length - 1 })
  t.match(await alice.next('error'), { code: 'UNAUTHORIZED', message: "the key 'alice' was removed" })
  t.equal((await closed)[0], 1008)
  await cut
  t.match(await bob.step(2, GRADIENTS), { step: 2 })
  t.equal((await fetch(`${url}/v1/runs`, { headers: bearer('alice') })).status, 401)
  bob.socket.close()
})

t.test('a stream ends with the scope or the prefix that it lives on, and goes on under other changes', async (t) => {
  const service = await twoTenants(t)
  const { url, file } = service
  const alice = () => openRun(url, 'alice-1', { headers: bearer('alice') })
  const change = (grants: object) => {
    file.write(KEYS.map((entry) => (entry.name === 'alice' ? { ...entry, ...grants } : entry)))
    service.reload()
  }
  for (const [grants, message] of [
    [{ scopes: ['read'] }, 'the stream takes a key with the scope step; this one has read'],
    [{ runs: 'alice.' }, "this key is for runs named alice.…, not 'alice-1'"],
  ] as const) {
    const trainer = await alice()
    const closed = once(trainer.socket, 'close')
    change(grants)
    t.match(await trainer.next('error'), { code: 'FORBIDDEN', message })
    t.equal((await closed)[0], 1008)
    change({})
  }
  const trainer = await alice()
  const idle = await stream(url, 'alice')
  const follow = async () => {
    const events = request(`${url}/v1/runs/alice-1/events`, { headers: bearer('alice'), agent: false }).end()
    return ((await once(events, 'response')) as [IncomingMessage])[0]
  }
  const followed = await follow()
  change({ scopes: ['step', 'read'] })
  t.equal(followed.destroyed, false, 'event streams, too')
  const cut = once(followed, 'error')
  change({ scopes: ['step', 'read'], runs: 'alice-2.' })
  await cut
  await once(trainer.socket, 'close')
  change({})
  const again = await alice()
  change({ scopes: ['step'] })
  t.match(await again.step(2, GRADIENTS), { step: 2 })
  t.match(await refused(again, { type: 'checkpoint' }), { code: 'FORBIDDEN' })
  t.equal(idle.socket.readyState, WebSocket.OPEN)
  for (const { socket } of [again, idle]) socket.close()
})

t.test('a file that cannot be used changes nothing, and one without a key lets nobody in', async (t) => {
  const service = await twoTenants(t)
  const { url, file } = service
  const status = async () => (await fetch(`${url}/v1/runs`, { headers: bearer('alice') })).status
  file.write([{ name: 'alice', scopes: ['write'] }])
  t.throws(() => service.reload(), {
    name: 'ConfigError',
    message: /keys\[0\]\.scopes\[0\] is "write", expected "step" or/,
  })
  t.equal(await status(), 200)
  file.write([])
  t.same(service.reload(), { keys: 0 })
  t.equal(await status(), 401)
  t.equal((await fetch(`${url}/v1/runs`)).status, 401)
})

t.test('no key is in an answer, a metric or the log', async (t) => {
  const lines: string[] = []
  const logger = pino({ level: 'trace' }, { write: (line: string) => void lines.push(line) })
  const file = keysFile(t, KEYS)
  const settings = { device: 'cpu', lanes: 1, staging_bytes: 2 ** 20, drain_seconds: 0, keys_file: file.path }
  const built = await buildApp({ config: configOf({ ...settings, api_keys: keyOf('env') }), logger })
  const url = await built.app.listen({ host: '127.0.0.1', port: 0 })
  const answers: string[] = []
  for (const key of ['env', 'root', 'alice', 'nobody']) {
    for (const path of ['/metrics', '/v1/runs', '/v1/runs/alice-1', '/v1/capabilities', '/nowhere', `/${keyOf(key)}`]) {
      const response = await fetch(`${url}${path}`, { headers: bearer(key) })
      answers.push((await response.text()).replace(`/${keyOf(key)}`, 'its own path'))
    }
  }
  const trainer = await openRun(url, 'alice-1', { protocols: [`bearer.${keyOf('alice')}`, 'muond.v1'] })
  answers.push(JSON.stringify(await refused(trainer, { type: 'end', step: 7 })))
  trainer.socket.close()
  file.write([])
  built.reload()
  await built.app.close()
  t.match(lines.join(''), /"event":"run_opened".*"key":"alice"/)
  for (const text of [...lines, ...answers]) t.notMatch(text, /-of-many-characters/)
})
