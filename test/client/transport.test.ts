import { createHash } from 'node:crypto'
import { closeSync, openSync, readdirSync, readFileSync, writeSync } from 'node:fs'
import t from 'tap'
import { type ConnectOptions, connect, type Gradient, type Run } from '../../src/client/client.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { gradientsOf, modelOf, randomFrom } from './model.js'
import { opened, receipt, say, startPeer } from './peer.js'
import { QUICK, startProxy, startService } from './service.js'
import { clientOf, fresh, service, train, turn } from './trainer.js'

const SHARED: ConnectOptions = { ...QUICK, transport: 'shm' }

/** A step whose gradients are written into the run's own arrays. */
function stepInPlace(run: Run, gradients: Gradient[]) {
  const views = gradients.map((gradient, index) => {
    const view = run.gradientView(index)
    view.set(gradient)
    return view
  })
  return run.step(views)
}

/** Memory of clients that is mapped into this process, and descriptors of it. */
function memory(): { mapped: number; descriptors: number } {
  const mapped = readFileSync('/proc/self/maps', 'utf8').split('\n')
  return {
    mapped: mapped.filter((line) => line.includes('/memfd:muond')).length,
    descriptors: readdirSync('/proc/self/fd').length,
  }
}

for (const durability of ['none', 'journal'] as const) {
  t.test(`shared memory has the bits of the socket, ${durability}`, async (t) => {
    const kept = durability === 'journal' ? { data: t.testdir(), durability } : {}
    const { url, drain } = await startService(kept)
    const expected = await train(await clientOf(t, QUICK, url), 'socket')
    t.equal(expected.run.transport, 'websocket')
    for (const [name, takeStep] of Object.entries({ copied: undefined, written: stepInPlace })) {
      const { weights, digest, run } = await train(await clientOf(t, SHARED, url), name, takeStep)
      t.equal(run.transport, 'shm')
      t.same(weights, expected.weights, name)
      t.equal(digest, expected.digest, name)
    }
    await drain()
  })
}

t.test('auto shares memory with a service on this host, and gradients may come one by one', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  const { transport: _, ...auto } = QUICK
  const { digest, run } = await train(await clientOf(t, auto), fresh(), async (run, gradients) => {
    for (const { name, index } of run.parameters) {
      run.gradient(name, gradients[index])
      if (index === 2) await turn()
    }
    return run.end()
  })
  t.equal(run.transport, 'shm')
  t.equal(digest, expected.digest)
})

t.test('connections that are cut change neither the weights nor the digest', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  for (let seed = 0; seed < 4; seed++) {
    const random = randomFrom(seed)
    const budgets = Array.from({ length: 12 }, () => Math.floor(2_300 + 400 * (1 + random())))
    const proxy = await startProxy(service.port, [3_500, ...budgets])
    t.teardown(() => proxy.close())
    const client = await clientOf(t, { ...SHARED, retries: 20 }, proxy.url)
    const { weights, digest } = await train(client, fresh(), stepInPlace)
    t.same(weights, expected.weights, `seed ${seed}`)
    t.equal(digest, expected.digest, `seed ${seed}`)
    t.ok(proxy.connections() > 1)
  }
})

t.test('a gradient that is not finite is refused by name, and the others are applied', async (t) => {
  const model = modelOf(fresh())
  const run = await (await clientOf(t, SHARED)).open(model)
  const gradients = gradientsOf(model.parameters, 1)
  run.gradientView('norm').set(gradients[3]!)
  run.gradientView('norm')[5] = NaN
  gradients[3] = run.gradientView('norm')
  await t.rejects(run.step(gradients), { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['norm'] } })
  const { applied, refused } = await run.step(gradients, { skip_refused: true })
  t.equal(applied, 4)
  t.match(refused, [{ code: 'GRADIENT_NOT_FINITE' }])
})

t.test('without shared memory a gradient has memory of its own', async (t) => {
  const expected = await train(await clientOf(t), fresh())
  const { digest, run } = await train(await clientOf(t), fresh(), stepInPlace)
  t.equal(run.transport, 'websocket')
  t.equal(run.gradientView('wide'), run.gradientView(0), 'always the same')
  t.throws(() => run.gradientView('other'), { code: 'PARAMETER_UNKNOWN' })
  t.equal(digest, expected.digest)
})

const PARAMETERS = [{ name: 'w', shape: [2], group: 'all', data: Float32Array.of(2, 4) }]
const taken = { kind: 'shm', refused: [] }
const refused = { kind: 'websocket', refused: [{ kind: 'shm', reason: 'of the peer' }] }

t.test('what is refused is told once, and must not be where shared memory was asked for', async (t) => {
  const offers: OpenFrame['transport'][] = []
  const peer = await startPeer((frame, socket) => {
    if (frame.type !== 'open') return
    offers.push(frame.transport)
    say(socket, { ...opened(), ...(frame.transport && { transport: refused }) })
  })
  t.teardown(() => peer.close())
  const warnings: string[] = []
  const heard = (warning: Error) => warnings.push(warning.message)
  process.on('warning', heard)
  const client = await connect(peer.url, { retries: 0 })
  const run = await client.open({ run: 'r', parameters: PARAMETERS })
  await run.reopen()
  await turn()
  process.off('warning', heard)
  t.equal(run.transport, 'websocket')
  t.match(warnings, [
    /go over the socket, which is slower than shared memory: shm: of the peer\. transport: 'websocket'/,
  ])
  t.match(offers, [[{ kind: 'shm', process: process.pid }], undefined])
  await client.close()
  const strict = await connect(peer.url, { transport: 'shm' })
  await t.rejects(strict.open({ run: 'r', parameters: PARAMETERS }), {
    code: 'REQUEST_INVALID',
    message: "transport 'shm' was not taken: shm: of the peer",
  })
  await strict.close()
})

t.test('a service that knows no transport, or sees other memory, is served over the socket', async (t) => {
  for (const transport of [undefined, taken]) {
    const peer = await startPeer((frame, socket) => {
      if (frame.type !== 'open') return
      say(socket, { ...opened(), ...(transport && frame.transport && { transport }) })
    })
    t.teardown(() => peer.close())
    const client = await connect(peer.url, { retries: 0 })
    const run = await client.open({ run: 'r', parameters: PARAMETERS })
    t.equal(run.transport, 'websocket')
    await client.close()
    const strict = await connect(peer.url, { transport: 'shm' })
    const message = transport
      ? "transport 'shm' was not taken: shm: the service does not see this process's memory"
      : "transport 'shm' was not taken: the service shares no memory"
    await t.rejects(strict.open({ run: 'r', parameters: PARAMETERS }), { message })
    await strict.close()
  }
  t.equal(memory().mapped, 0)
})

t.test('memory that a service has taken and does not see any more is offered no more, and stays', async (t) => {
  const offers: boolean[] = []
  const peer = await startPeer((frame, socket) => {
    if (frame.type !== 'open') return
    offers.push(frame.transport !== undefined)
    if (offers.length === 1) prove(frame)
    say(socket, { ...opened(), ...(frame.transport && { transport: taken }) })
  })
  t.teardown(() => peer.close())
  const client = await connect(peer.url, { retries: 0 })
  const run = await client.open({ run: 'r', parameters: PARAMETERS })
  t.equal(run.transport, 'shm')
  run.gradientView(0).fill(1)
  for (const expected of [
    [true, true, false],
    [true, true, false, false],
  ]) {
    await run.reopen()
    t.same(offers, expected)
    t.equal(run.transport, 'websocket')
    t.equal(run.gradientView(0)[0], 1, 'what was written for a step is there')
  }
  await client.close()
})

const UPDATES = { type: 'updates', replayed: false, gradient_norm: [1], update_rms: [1] } as const

t.test('updates in shared memory that no service sends end the step, and nothing is applied', async (t) => {
  const cases: [string, object, boolean, string][] = [
    ['of nothing', { parameters: [9], scale: [1], decay: [0], step: 1 }, true, 'PARAMETER_UNKNOWN'],
    ['of another step', { parameters: [0], scale: [1], decay: [0], step: 7 }, true, 'FRAME_UNEXPECTED'],
    ['without factors', { parameters: [0], scale: [], decay: [], step: 1 }, true, 'FRAME_UNEXPECTED'],
    ['without memory', { parameters: [0], scale: [1], decay: [0], step: 1 }, false, 'FRAME_UNEXPECTED'],
  ]
  for (const [title, updates, isShared, code] of cases) {
    const peer = await startPeer((frame, socket) => {
      if (frame.type === 'end') say(socket, { ...UPDATES, ...updates } as never, receipt(1))
      if (frame.type !== 'open') return
      prove(frame)
      say(socket, { ...opened(), ...(isShared && { transport: taken }) })
    })
    t.teardown(() => peer.close())
    const data = Float32Array.of(2, 4)
    const client = await connect(peer.url, { retries: 0 })
    const run = await client.open({ run: 'r', parameters: [{ ...PARAMETERS[0]!, data }] })
    await t.rejects(run.step([Float32Array.of(1, 1)]), { code }, title)
    t.same(data, Float32Array.of(2, 4))
    await client.close()
  }
})

/** What a service does that has mapped the memory. */
function prove({ transport = [] }: OpenFrame): void {
  for (const { nonce, descriptors = [] } of transport) {
    const file = openSync(`/proc/self/fd/${descriptors[1]}`, 'r+')
    writeSync(file, createHash('sha256').update(nonce).digest(), 0, 32, 0)
    closeSync(file)
  }
}

t.test('what is closed leaves neither memory nor descriptors, and views of it lead nowhere', async (t) => {
  const before = memory()
  let view = new Float32Array(0) as Gradient
  for (let i = 0; i < 1000; i++) {
    const client = await connect(service.url, SHARED)
    const run = await client.open({ run: 'again', mode: 'create_or_resume', ...one(), takeover: true })
    view = run.gradientView(0)
    view.fill(i)
    await client.close()
  }
  while (service.runs.get('again').connected) await turn()
  t.same(view, new Float32Array(8), 'zeros')
  t.same(memory(), before)
})

const one = () => ({
  groups: [{ name: 'g', algorithm: 'sgd' }],
  parameters: [{ name: 'w', shape: [8], group: 'g', data: new Float32Array(8) }],
})

t.test('a transport that there is not is refused', async (t) => {
  const options = { transport: 'rdma' } as never
  await t.rejects(connect(service.url, options), {
    name: 'RangeError',
    message: 'transport is "rdma", expected one of auto, shm, websocket',
  })
})
