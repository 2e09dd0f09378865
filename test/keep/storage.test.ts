import { readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import koffi from 'koffi'
import { pino } from 'pino'
import t from 'tap'
import { buildApp } from '../../src/app.js'
import { configOf } from '../../src/config.js'
import { openOnnxRuntime } from '../../src/device/onnx/onnxruntime.js'
import { encodeHead, type Head } from '../../src/store/journal/journal-format.js'
import { readJournal } from '../../src/store/journal/journal-reader.js'
import { lockFolder } from '../../src/store/lock.js'
import { gradientsOf, known, MODEL, type Trace, train, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, startService, until } from '../service.js'
import { checkpoints, id, runFolder, start } from './data-folder.js'

// Simulates a full disk: no file of this process may grow beyond a size (setrlimit(2), RLIMIT_FSIZE).
const setrlimit = koffi.load(null).func('setrlimit', 'int', ['int', 'void *'])
const RLIMIT_FSIZE = 1
const NO_LIMIT = 2n ** 64n - 1n
// The system then sends SIGXFSZ, which ends a process that has no handler for it.
process.on('SIGXFSZ', () => {})
function limitFiles(bytes?: number): void {
  t.equal(setrlimit(RLIMIT_FSIZE, BigUint64Array.of(bytes === undefined ? NO_LIMIT : BigInt(bytes), NO_LIMIT)), 0)
}

const LAST = 4
let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})

const journalOf = (data: string) => join(runFolder(data), 'journal')

t.test('a step that the journal has no room for is not finished; sent again it is, and nothing is lost', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal', checkpoint_steps: 0 })
  const { client } = await train(service, { last: 2 })
  const [name] = readdirSync(journalOf(data))
  const { size } = statSync(join(journalOf(data), name!))
  limitFiles(size + 2000)
  for (const [i, values] of gradientsOf(3).entries()) if (values) client.gradient(i, 3, { values })
  client.send({ type: 'end', step: 3, skipped: [5] })
  t.match(await client.expect('error'), {
    code: 'STORAGE_FAILED',
    retryable: true,
    step: 3,
    retry_after_seconds: 1,
    message: /^the journal of run 'r' cannot be written, step 3 is not finished: EFBIG/,
  })
  t.equal(statSync(join(journalOf(data), name!)).size, size, 'the file is as it was')
  limitFiles()
  client.send({ type: 'end', step: 3, skipped: [5] })
  t.match(await client.expect('error'), { code: 'STORAGE_FAILED', message: /have to be sent again$/ })
  await client.close()
  // The client sent other settings than the undisturbed run had, so it begins the step anew.
  const again = await RawClient.connect(service.url)
  t.match(await again.open({ run: 'r', mode: 'resume' }), { step: 2, ahead: [0, 1, 2, 3, 4, 6] })
  for (const [i, values] of gradientsOf(3).entries()) if (values) again.gradient(i, 3, { values })
  again.send({ type: 'end', step: 3, skipped: [5] })
  const { digest } = await again.expect('receipt')
  t.ok([...again.updates.values()].every(({ replayed }) => replayed))
  await again.close()
  await service.app.close()
  const last = await start(data, { durability: 'journal' })
  const client3 = await RawClient.connect(last.url)
  t.match(await client3.open({ run: 'r', mode: 'resume' }), { step: 3, digest })
  await client3.close()
  await last.app.close()
})

t.test('a gradient keeps its memory until the journal has read it, though its update was sent', async (t) => {
  const service = await start(t.testdir({}), { durability: 'journal', checkpoint_steps: 0 })
  const client = await RawClient.connect(service.url)
  const parameters = [{ name: 'p', shape: [1024], group: 'g' }]
  await client.open({ run: 'r', groups: [{ name: 'g', algorithm: 'sgd', lr: 0.1 }], parameters })
  const { journal } = service.runs.get('r')
  const append = journal!.append.bind(journal!)
  let write: (() => void) | undefined
  journal!.append = (...record) =>
    new Promise((written) => {
      write = () => void append(...record).then(written)
    })
  client.gradient(0, 1, { values: new Float32Array(1024) })
  await until(() => client.updates.size === 1)
  t.equal(service.device.staging.used, 4096)
  write!()
  await until(() => service.device.staging.used === 0)
  client.send({ type: 'end', step: 1, skipped: [] })
  t.match(await client.expect('receipt'), { step: 1, durable: true })
  await client.close()
  await service.app.close()
})

t.test('a full disk refuses a new run, and leaves nothing of it', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const client = await RawClient.connect(service.url)
  for (const bytes of [10, 300]) {
    limitFiles(bytes)
    client.send({ type: 'open', protocol: 1, run: 'r', ...MODEL })
    t.match(await client.expect('error'), { code: 'STORAGE_FAILED', message: /run 'r'.* cannot be written: EFBIG/ })
    limitFiles()
    t.equal(service.device.admittedBytes, 0)
    t.same(service.runs.list(), [])
  }
  writeFileSync(join(data, 'runs', 'file'), '')
  client.send({ type: 'open', protocol: 1, run: 'file', ...MODEL })
  t.match(await client.expect('error'), {
    code: 'STORAGE_FAILED',
    message: /^the folder of run 'file' cannot be written: (ENOTDIR|EEXIST)/,
  })
  await client.open({ run: 'r', ...MODEL })
  t.same(known([await trainStep(client, 1)]), known(reference.slice(0, 1)))
  await client.close()
  await service.app.close()
})

t.test('an open that cannot be noted is refused, and the run stays where it is', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { checkpoint_steps: 1 })
  const { client } = await train(service, { last: 2 })
  const second = await RawClient.connect(service.url)
  const memory = service.device.memory.bytes
  const open = { type: 'open', protocol: 1, run: 'r', mode: 'resume', takeover: true } as const
  for (const more of [{}, { checkpoint: id(1) }]) {
    limitFiles(10)
    second.send({ ...open, ...more })
    t.match(await second.expect('error'), {
      code: 'STORAGE_FAILED',
      message: /^the folder of run 'r' cannot be written: EFBIG/,
    })
    limitFiles()
  }
  t.equal(service.device.memory.bytes, memory, 'what was read of the checkpoint is given back')
  // The groups of the open take more room than its epoch.
  limitFiles(200)
  second.send({ ...open, groups: MODEL.groups })
  t.match(await second.expect('error'), { code: 'STORAGE_FAILED' })
  limitFiles()
  t.match(await client.closed(), { code: 4409 }, 'the older connection has lost the run all the same')
  t.notOk(service.runs.get('r').connected)
  t.match(await second.open({ run: 'r', mode: 'resume' }), { step: 2 })
  t.same(known([await trainStep(second, 3)]), known(reference.slice(2, 3)))
  await second.close()
  await service.app.close()
})

t.test('a checkpoint that is due and cannot be written is logged, and taken after a later step', async (t) => {
  const data = t.testdir({})
  const events: { event: string }[] = []
  const log = (event: { event: string }) => void events.push(event)
  const service = await startLogged(data, log, { checkpoint_steps: 2, checkpoints_kept: 1 })
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', ...MODEL })
  await trainStep(client, 1)
  limitFiles(300)
  await trainStep(client, 2)
  await until(() => events.some(({ event }) => event === 'checkpoint_failed'))
  limitFiles()
  t.match(
    events.find(({ event }) => event === 'checkpoint_failed'),
    { run: 'r', step: 2, reason: /^the checkpoint of run 'r' at step 2 cannot be written: EFBIG/ },
  )
  t.same(
    checkpoints(data).filter((name) => name !== id(2)),
    [id(0)],
  )
  // A person has removed a checkpoint by hand: the next one is written all the same, only no old one is removed.
  rmSync(join(runFolder(data), 'checkpoints', id(0)), { recursive: true })
  await trainStep(client, 3)
  await trainStep(client, 4)
  await until(() => events.some(({ event }) => event === 'tidy_failed'))
  t.ok(checkpoints(data).includes(id(4)))
  const response = await fetch(`${service.http}/v1/runs/r/checkpoints`, {
    method: 'POST',
    body: '{"tag":"t"}',
    headers: { 'content-type': 'application/json' },
  })
  t.equal(response.status, 201)
  rmSync(join(runFolder(data), 'checkpoints', id(4), 'manifest.json'))
  const tag = { method: 'POST', body: '{"tag":"u"}', headers: { 'content-type': 'application/json' } }
  t.match(await (await fetch(`${service.http}/v1/runs/r/checkpoints`, tag)).json(), { code: 'STORAGE_FAILED' })
  await trainStep(client, 5)
  await fetch(`${service.http}/v1/runs/r/checkpoints`, { method: 'POST' })
  t.match(await (await fetch(`${service.http}/v1/runs/r/checkpoints/t`, { method: 'DELETE' })).json(), {
    code: 'STORAGE_FAILED',
    detail: /^checkpoint 'step-0{11}4' cannot be removed: ENOENT/,
  })
  await client.close()
  await service.app.close()
})

t.test('going back that fails half way leaves the run to the disk', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal', checkpoint_steps: 1 })
  const { client } = await train(service, { last: 2 })
  // No folder for the new branch can be made.
  const branches = join(runFolder(data), 'branches')
  writeFileSync(branches, '')
  const second = await RawClient.connect(service.url)
  second.send({ type: 'open', protocol: 1, run: 'r', mode: 'resume', takeover: true, checkpoint: id(1) })
  t.match(await second.expect('error'), { code: 'STORAGE_FAILED' })
  t.match(await client.closed(), { code: 4409 })
  t.same(service.runs.list(), [])
  t.equal(service.device.admittedBytes, 0)
  rmSync(branches)
  // The newest checkpoint is still there; with other parameters it is not opened.
  second.send({
    type: 'open',
    protocol: 1,
    run: 'r',
    mode: 'resume',
    checkpoint: id(1),
    parameters: MODEL.parameters.slice(1),
  })
  t.match(await second.expect('error'), { code: 'RUN_MISMATCH' })
  t.same(service.runs.list(), [])
  t.match(await second.open({ run: 'r', mode: 'resume' }), { step: 2, digest: reference[1]!.digest })
  await second.close()
  await service.app.close()
})

t.test('what going back cannot remove keeps no run from its new place, nor from a restart there', async (t) => {
  const data = t.testdir({})
  const events: { event: string; run?: string }[] = []
  const service = await startLogged(data, (event) => events.push(event), { durability: 'journal', checkpoint_steps: 1 })
  const { client } = await train(service, { last: 2 })
  await client.close()
  // The journal of the branch that is left cannot be cleared.
  rmSync(journalOf(data), { recursive: true })
  writeFileSync(journalOf(data), '')
  const second = await RawClient.connect(service.url)
  t.match(await second.open({ run: 'r', mode: 'resume', checkpoint: id(1) }), { step: 1 })
  t.match(
    events.filter(({ event }) => event === 'tidy_failed'),
    [{ run: 'r' }],
  )
  const { digest } = await trainStep(second, 2)
  await second.close()
  await service.app.close()
  const again = await start(data, { durability: 'journal' })
  const third = await RawClient.connect(again.url)
  t.match(await third.open({ run: 'r', mode: 'resume' }), { step: 2, digest })
  await third.close()
  await again.app.close()
})

t.test('a run that cannot be removed from the disk is still there', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  await (await train(service, { last: 1 })).client.close()
  rmSync(runFolder(data), { recursive: true })
  const response = await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })
  t.match(await response.json(), { code: 'STORAGE_FAILED', detail: /^the folder of run 'r' cannot be written: ENOENT/ })
  t.equal(service.device.memory.bytes, 0)
  t.match([...service.runs.stored.keys()], ['r'])
  await service.app.close()
})

const NONE = '0'.repeat(64)

t.test('a journal that tells of something else than its gradients give is refused with the record', async (t) => {
  const data = t.testdir({})
  const settings = { durability: 'journal', checkpoint_steps: 0 } as const
  const service = await start(data, settings)
  await (await train(service, { last: 2 })).client.close()
  await service.app.close()
  const { steps } = await readJournal(journalOf(data), 0)
  const path = join(journalOf(data), readdirSync(journalOf(data))[0]!)
  const bytes = readFileSync(path)
  const rewrite = (change: (head: Head, payload: Uint8Array) => [Head, Uint8Array]) => {
    const records = steps.flatMap(({ gradients, end }) => [
      ...gradients.map(({ at, bytes: length, path: _, label: __, ...head }) =>
        change(head, bytes.subarray(at, at + length)),
      ),
      change(end, new Uint8Array()),
    ])
    writeFileSync(
      path,
      Buffer.concat(records.flatMap(([head, payload]) => [encodeHead(head, payload.length), payload])),
    )
  }
  const cases: [string, RegExp, (head: Head, payload: Uint8Array) => [Head, Uint8Array]][] = [
    [
      'an update',
      /record 1 at byte 0: the update of parameter 'm' has fingerprint [0-9a-f]{16}, expected 0{16}$/,
      (head, payload) => [
        head.type === 'gradient' ? { ...head, applied: { ...head.applied, update_fingerprint: '0'.repeat(16) } } : head,
        payload,
      ],
    ],
    [
      'a length',
      /record 1 at byte 0: the gradient of parameter 'm' has 1535 bytes, expected 1536$/,
      (head, payload) => [head, head.type === 'gradient' ? payload.subarray(1) : payload],
    ],
    [
      'a parameter',
      /record 1 at byte 0: run 'r' has 7 parameters, there is no index 99$/,
      (head, payload) => [head.type === 'gradient' ? { ...head, parameter: 99 } : head, payload],
    ],
    [
      'a digest',
      /record 8 at byte \d+: step 1 has digest [0-9a-f]{64}, expected 0{64}$/,
      (head, payload) => [
        head.type === 'end' ? { ...head, digest: NONE, receipt: { ...head.receipt, digest: NONE } } : head,
        payload,
      ],
    ],
    [
      'a digest that is none',
      /record 8 at byte \d+: digest is "abc", expected a SHA-256 in hexadecimal$/,
      (head, payload) => [head.type === 'end' ? { ...head, digest: 'abc' } : head, payload],
    ],
  ]
  for (const [name, message, change] of cases) {
    rewrite(change)
    const again = await start(data, settings)
    await again.restored
    t.match(again.runs.stored.get('r'), message, name)
    t.equal(again.device.memory.bytes, 0)
    await again.app.close()
  }
})

t.test('a start that fails gives the data folder free', async (t) => {
  const data = t.testdir({})
  await t.rejects(buildApp({ config: configOf({ data, device: 'cuda' }) }), /not usable/)
  const lock = await lockFolder(data, 0)
  await t.rejects(buildApp({ config: configOf({ data, device: 'cpu' }) }), {
    name: 'ConfigError',
    message: /is in use by process/,
  })
  lock.release()
  writeFileSync(join(data, 'file'), '')
  await t.rejects(buildApp({ config: configOf({ data: join(data, 'file'), device: 'cpu' }) }), {
    name: 'ConfigError',
    message: /is not writable/,
  })
  t.ok(openOnnxRuntime().version)
})

async function startLogged(data: string, log: (event: { event: string }) => void, settings: object) {
  const config = configOf({ device: 'cpu', port: 0, staging_bytes: 2 ** 20, lanes: 1, data, ...settings })
  const logger = pino({ level: 'info' }, { write: (line: string) => log(JSON.parse(line)) })
  const built = await buildApp({ config, logger })
  const http = await built.app.listen({ port: 0, host: '127.0.0.1' })
  return { ...built, http, url: `${http.replace('http', 'ws')}/v1/stream` }
}
