import { once } from 'node:events'
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { join } from 'node:path'
import t from 'tap'
import { type Manifest, openManifest, sealManifest } from '../../src/store/checkpoint/manifest.js'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { encodeWithData } from '../../src/wire/codec.js'
import { gradientsOf, known, type Trace, train, trainStep } from '../run/trainer.js'
import { bytesOf, RawClient, type Service, startService, until } from '../service.js'
import { checkpoints, id, start } from './data-folder.js'

const DURABILITIES = ['checkpoint', 'journal'] as const

async function exported({ http }: Service, run: string): Promise<Buffer> {
  return Buffer.from(await (await fetch(`${http}/v1/runs/${run}/state`)).arrayBuffer())
}

async function imported({ http }: Service, body: Uint8Array) {
  const headers = { 'content-type': 'application/octet-stream' }
  const response = await fetch(`${http}/v1/runs/r/state`, { method: 'PUT', body, headers })
  return { status: response.status, body: (await response.json()) as Record<string, unknown> }
}

/** A state to import, and the steps 6 to 9 of a run `r` that has imported it after step 5. */
let body: Buffer
let digest: unknown
let reference: Trace[]
t.before(async () => {
  const service = await startService({ staging_bytes: 2 ** 20, lanes: 1 })
  const source = await train(service, { run: 'source', last: 3 })
  body = await exported(service, 'source')
  const { client } = await train(service, { last: 5 })
  digest = (await imported(service, body)).body.digest
  reference = []
  for (let step = 6; step <= 9; step++) reference.push(await trainStep(client, step))
  await source.client.close()
  await client.close()
  await service.app.close()
})

t.test('a state that comes between two chunks of a gradient that is sent again refuses the gradient', async (t) => {
  const service = await startService({ lanes: 1 })
  const { client } = await train(service, { last: 5 })
  const [first] = gradientsOf(5)
  const bytes = bytesOf(first!)
  const chunk = (from: number, to?: number) =>
    client.socket.send(
      encodeWithData({ type: 'gradient', parameter: 0, step: 5, offset: from }, bytes.subarray(from, to)),
    )
  chunk(0, 64)
  await until(() => service.device.staging.used > 0)
  await imported(service, body)
  chunk(64)
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT', message: /its state was imported since/ })
  t.equal(service.device.staging.used, 0)
  await client.close()
  await service.app.close()
})

for (const durability of DURABILITIES) {
  t.test(`${durability}: an import is on the disk when it is answered, and a restart goes on from it`, async (t) => {
    const data = t.testdir({})
    const service = await start(data, { durability })
    const { client } = await train(service, { last: 5 })
    t.match(await imported(service, body), { status: 200, body: { step: 5, digest, checkpoint: `${id(5)}.1` } })
    t.same(checkpoints(data), [id(0), id(5), `${id(5)}.1`])
    await client.close()
    await service.app.close()
    const again = await start(data, { durability })
    const after = await train(again, { last: 7, open: { mode: 'resume' } })
    t.match(after.opened, { step: 5, digest, ahead: [], note: 'its state was imported after step 5' })
    t.same(known(after.traces), known(reference.slice(0, 2)))
    await after.client.close()
    await again.app.close()
    const third = await start(data, { durability })
    const last = await train(third, { last: 9, open: { mode: 'resume' } })
    t.equal(last.opened.step, durability === 'journal' ? 7 : 5)
    t.same(known(last.traces), known(reference.slice(last.opened.step - 5)))
    await last.client.close()
    await third.app.close()
  })
}

t.test('what was imported and restored cannot replay the step before', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 5 })
  await imported(service, body)
  await client.close()
  await service.app.close()
  const again = await start(data)
  const next = await RawClient.connect(again.url)
  await next.open({ run: 'r', mode: 'resume' })
  next.gradient(0, 5, { values: gradientsOf(5)[0]! })
  t.match(await next.expect('error'), { code: 'STEP_CONFLICT', message: /and its state was imported since/ })
  await next.close()
  await again.app.close()
})

t.test('one goes back to a checkpoint before an import, or to one with it', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { checkpoints_kept: 9 })
  const undisturbed = await train(service, { run: 'undisturbed', last: 6 })
  const { client } = await train(service, { last: 5 })
  const own = await exported(service, 'r')
  await imported(service, own)
  const second = await imported(service, body)
  t.match(second.body, { digest, checkpoint: `${id(5)}.2` })
  t.match(await imported(service, body), { body: { digest, checkpoint: `${id(5)}.3` } })
  await trainStep(client, 6)
  t.same(checkpoints(data), [id(0), id(5), `${id(5)}.1`, `${id(5)}.2`, `${id(5)}.3`])
  await client.close()
  const steps = { mode: 'resume', takeover: true } as const
  const back = await train(service, { last: 6, open: { ...steps, checkpoint: `${id(5)}.2` } })
  t.match(back.opened, { step: 5, digest, note: 'its state was imported after step 5' })
  t.same(known(back.traces), known(reference.slice(0, 1)))
  t.same(checkpoints(data), [id(0), id(5), `${id(5)}.1`, `${id(5)}.2`], '.3 has the same state, and came later')
  await back.client.close()
  const before = await train(service, { last: 6, open: { ...steps, checkpoint: id(5) } })
  t.same(before.opened.note, undefined)
  t.same(known(before.traces), known(undisturbed.traces.slice(5)))
  t.same(checkpoints(data), [id(0), id(5)])
  await before.client.close()
  await undisturbed.client.close()
  await service.app.close()
})

t.test('ten imports after one step are listed in their order', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { checkpoints_kept: 20 })
  const { client } = await train(service, { last: 1 })
  const own = await exported(service, 'r')
  for (let i = 0; i < 6; i++) {
    await imported(service, own)
    await imported(service, body)
  }
  await client.close()
  await service.app.close()
  const again = await start(data, { checkpoints_kept: 20 })
  await again.restored
  const listed = (await (await fetch(`${again.http}/v1/runs/r/checkpoints`)).json()) as {
    checkpoints: { checkpoint: string }[]
  }
  t.same(
    listed.checkpoints.map(({ checkpoint }) => checkpoint),
    [id(0), ...Array.from({ length: 12 }, (_, i) => `${id(1)}.${i + 1}`)],
  )
  t.same(parseSafetensors(await exported(again, 'r')).tensors, parseSafetensors(body).tensors)
  await again.app.close()
})

/** False records of an import in a manifest whose hash is right. */
const LIES: [string, (manifest: Manifest) => Partial<Manifest>, RegExp][] = [
  [
    'another hash',
    ({ imported }) => ({ imported: { ...imported!, hashes: [['00'.repeat(32)], ...imported!.hashes.slice(1)] } }),
    /the state imported after step 5 of run 'r' has digest [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  ],
  [
    'another count',
    ({ places }) => ({ places: [{ ...places[0]!, count: 99 }, ...places.slice(1)] }),
    /the state imported after step 5 of run 'r' has digest/,
  ],
  [
    'another step before',
    ({ imported }) => ({ imported: { ...imported!, step_digest: '00'.repeat(32) } }),
    /step 5 of run 'r' has digest [0-9a-f]{64}, expected 0{64}$/,
  ],
  ['no import', () => ({ imported: undefined }), /step 5 of run 'r' has digest/],
]

t.test('a checkpoint whose digest does not follow from its import is refused', async (t) => {
  for (const [name, lie, message] of LIES) {
    const data = t.testdir({ [name.replaceAll(' ', '-')]: {} })
    const service = await start(data)
    const { client } = await train(service, { last: 5 })
    await imported(service, body)
    await client.close()
    await service.app.close()
    const path = join(data, 'runs', 'r', 'checkpoints', `${id(5)}.1`, 'manifest.json')
    const { sha256: _, ...manifest } = openManifest(readFileSync(path, 'utf8'), path) as Manifest & { sha256: string }
    const changed = Object.entries({ ...manifest, ...lie(manifest) }).filter(([, value]) => value !== undefined)
    writeFileSync(path, sealManifest(Object.fromEntries(changed) as Manifest))
    const again = await start(data)
    await again.restored
    t.match([...again.runs.stored], [['r', message]], name)
    t.equal(again.device.memory.bytes, 0)
    await again.app.close()
  }
})

t.test('an import that the disk cannot take is no import', async (t) => {
  const data = t.testdir({})
  const service = await start(data, { durability: 'journal' })
  const { client } = await train(service, { last: 5 })
  const undisturbed = await train(service, { run: 'undisturbed', last: 6 })
  const [before, bytes] = [await exported(service, 'r'), service.device.memory.bytes]
  // Not even root can make a folder where a file is.
  const taken = join(data, 'runs', 'r', 'checkpoints', `${id(5)}.1`)
  writeFileSync(taken, '')
  t.match(await imported(service, body), { status: 507, body: { code: 'STORAGE_FAILED', retryable: true } })
  t.same(await exported(service, 'r'), before)
  t.equal(service.device.memory.bytes, bytes)
  t.same(known([await trainStep(client, 6)]), known(undisturbed.traces.slice(5)))
  rmSync(taken)
  t.match(await imported(service, body), { status: 200, body: { step: 6, checkpoint: `${id(6)}.1` } })
  t.ok(existsSync(join(data, 'runs', 'r', 'checkpoints', `${id(6)}.1`, 'manifest.json')))
  await client.close()
  await undisturbed.client.close()
  await service.app.close()
})

/** Begins an import: all of it is sent but the last byte. */
function begin({ http }: Service) {
  const outgoing = request(`${http}/v1/runs/r/state`, {
    method: 'PUT',
    headers: { 'content-type': 'application/octet-stream', 'content-length': body.length },
  })
  outgoing.on('error', () => {})
  outgoing.write(body.subarray(0, -1))
  const answer = new Promise<{ status: number; text: string }>((resolve, reject) => {
    outgoing.on('response', async (response) => {
      outgoing.removeAllListeners('close')
      resolve({ status: response.statusCode!, text: Buffer.concat(await response.toArray()).toString() })
    })
    outgoing.on('close', () => reject(new Error('the connection was closed')))
  })
  answer.catch(() => {})
  return { outgoing, answer }
}

const received = async ({ device, runs }: Service) => {
  const own = runs.list().reduce((sum, { grant }) => sum + grant.bytes[0]!, 0)
  while (device.admittedBytes === own) await new Promise(setImmediate)
}

t.test('a run that is deleted meanwhile takes nothing', async (t) => {
  const service = await startService({ staging_bytes: 2 ** 20, lanes: 1 })
  const { client } = await train(service, { last: 1 })
  const { outgoing, answer } = begin(service)
  await received(service)
  await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })
  outgoing.end(body.subarray(-1))
  t.match(await answer, { status: 404, text: /was deleted while its state was received.*RUN_NOT_FOUND/ })
  t.equal(service.device.memory.bytes, 0)
  t.equal(service.device.admittedBytes, 0)
  await client.closed()
  await service.app.close()
})

t.test('a shutdown ends an import that is being received, and lets none begin', async (t) => {
  const data = t.testdir({})
  const service = await start(data)
  const { client } = await train(service, { last: 1 })
  const { answer } = begin(service)
  await received(service)
  await client.close()
  service.runs.draining = true
  t.match(await imported(service, body), { status: 503, body: { code: 'DRAINING' } })
  await service.app.close()
  await t.rejects(answer, { message: 'the connection was closed' })
  t.equal(service.runs.get('r').step, 1)
  t.same(checkpoints(data), [id(0)])
})

t.test('a connection that takes the run over while an import waits for it has the state of the import', async (t) => {
  const service = await startService({ staging_bytes: 2 ** 20, lanes: 1 })
  const { client } = await train(service, { last: 5 })
  client.gradient(0, 6, { values: gradientsOf(6)[0]! })
  while (service.runs.get('r').ahead.length === 0) await new Promise(setImmediate)
  const run = service.runs.get('r')
  const listening = run.listenerCount('receipt')
  const importing = imported(service, body)
  while (run.listenerCount('receipt') === listening) await new Promise(setImmediate)
  const second = await RawClient.connect(service.url)
  t.match(await second.open({ run: 'r', mode: 'resume', takeover: true }), { step: 5, ahead: [0] })
  await trainStep(second, 6).catch(() => undefined)
  await second.close()
  const third = await RawClient.connect(service.url)
  await third.open({ run: 'r', mode: 'resume', takeover: true })
  third.send({ type: 'end', step: 6, skipped: [1, 2, 3, 4, 5, 6] })
  await third.expect('receipt')
  t.match(await importing, { status: 200, body: { step: 6 } })
  await third.close()
  await service.app.close()
})

/** An import that was received and waits for the run's folder, which is in use until `release` is called. */
async function heldImport(service: Service) {
  const keeper = service.runs.keeper('r')
  let release = () => {}
  const held = keeper.alone(
    () =>
      new Promise<void>((resolve) => {
        release = resolve
      }),
  )
  const arrived = new Promise<void>((resolve) => {
    const own = keeper.import.bind(keeper)
    keeper.import = (pending) => {
      const importing = own(pending)
      resolve()
      return importing
    }
  })
  const answer = imported(service, body)
  await arrived
  return { answer, release: () => release(), held }
}

/** Resolves once the service has received all that a client has sent. */
async function allReceived(client: RawClient): Promise<void> {
  client.socket.ping()
  await once(client.socket, 'pong')
}

t.test('a gradient and an end that come while state is imported wait for it', async (t) => {
  const service = await start(t.testdir({}), { checkpoint_steps: 0 })
  const { client } = await train(service, { last: 5 })
  const { answer, release, held } = await heldImport(service)
  for (const [i, values] of gradientsOf(6).entries()) if (values) client.gradient(i, 6, { values })
  await allReceived(client)
  t.same(service.runs.get('r').ahead, [])
  release()
  await held
  t.match(await answer, { status: 200, body: { step: 5, digest } })
  client.send({ type: 'end', step: 6, skipped: [5] })
  t.match(await client.expect('receipt'), { step: 6 })
  await client.close()
  await service.app.close()
})

t.test('an end alone that comes while state is imported waits for it', async (t) => {
  const service = await start(t.testdir({}), { checkpoint_steps: 0 })
  const { client } = await train(service, { last: 5 })
  const { answer, release, held } = await heldImport(service)
  client.send({ type: 'end', step: 6, skipped: [0, 1, 2, 3, 4, 5, 6] })
  await allReceived(client)
  t.equal(service.runs.get('r').step, 5)
  release()
  await held
  t.match(await answer, { status: 200, body: { step: 5, digest } })
  t.match(await client.expect('receipt'), { step: 6 })
  await client.close()
  await service.app.close()
})

t.test('a gradient whose connection is gone when an import has ended is not computed', async (t) => {
  const service = await start(t.testdir({}), { checkpoint_steps: 0 })
  const { client } = await train(service, { last: 5 })
  const { answer, release, held } = await heldImport(service)
  client.gradient(0, 6, { values: gradientsOf(6)[0]! })
  await allReceived(client)
  await client.close()
  await until(() => !service.runs.get('r').connected)
  release()
  await held
  t.match(await answer, { status: 200, body: { step: 5, digest } })
  const next = await RawClient.connect(service.url)
  t.match(await next.open({ run: 'r', mode: 'resume' }), { step: 5, digest, ahead: [] })
  await next.close()
  await service.app.close()
})
