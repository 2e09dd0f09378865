import { once } from 'node:events'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import { Device } from '../../src/device/device.js'
import { Region, Views, wholeOf } from '../../src/device/region.js'

const start = () =>
  Device.start({
    ...{ device: 'cpu', onnxruntime_dir: '', lanes: 1, threads: 1 },
    ...{ staging_bytes: 4096, state_bytes_limit: 2 ** 20 },
  })

const nothing = () => {}

t.test('a region has its own bytes and none of its neighbours', async (t) => {
  const device = await start()
  const [first, second] = [device.staging.tryReserve(100)!, device.staging.tryReserve(200)!]
  t.same([first.view.length, second.view.length], [100, 200])
  first.view.fill(1)
  second.view.fill(2)
  t.ok(first.view.every((byte) => byte === 1))
  second.chunk(8, 4).fill(3)
  t.same([...second.view.subarray(6, 14)], [2, 2, 3, 3, 3, 3, 2, 2])
  t.equal(first.view.buffer, second.view.buffer, 'a thread has one view of an allocation')
  for (const [offset, bytes] of [
    [-1, 2],
    [0, -1],
    [0, 201],
    [200, 1],
  ] as const) {
    t.throws(() => second.chunk(offset, bytes), {
      message: `bytes ${offset} to ${offset + bytes} of a region of 200 bytes`,
    })
    t.throws(() => second.carve(offset, bytes, nothing), { code: 'ERR_ASSERTION' })
  }
  t.equal(second.chunk(200, 0).length, 0)
  await device.close()
})

t.test('what was released can neither be released again nor used', async (t) => {
  let freed = 0
  const region = new Region(wholeOf({ pointer: 4096n, bytes: 64 }, 'host'), new Views(), () => {
    freed += 1
  })
  region.retain().release()
  t.equal(freed, 0, 'one reference is left')
  region.release()
  t.equal(freed, 1)
  const uses = [
    () => region.release(),
    () => region.retain(),
    () => region.view,
    () => region.chunk(0, 1),
    () => region.carve(0, 1, nothing),
  ]
  for (const use of uses) t.throws(use, { message: 'the region of 64 bytes at 4096 was released already' })
  t.equal(freed, 1)
})

t.test(
  'an allocation is forgotten with its last reference: another one at its address has a view of its own',
  async (t) => {
    const device = await start()
    const first = device.allocateHost(64)
    const { pointer, view } = first
    const views = new Views()
    t.equal(views.of(first).buffer, views.of(first).buffer)
    views.forget(pointer)
    t.not(views.of(wholeOf({ pointer, bytes: 32 }, 'host')).buffer, view.buffer)
    first.release()
    t.throws(() => first.view, /was released already/)
    await device.close()
  },
)

t.test('memory of a GPU has no view on the host', async (t) => {
  const region = new Region(wholeOf({ pointer: 4096n, bytes: 64 }, 'gpu'), new Views(), nothing)
  t.throws(() => region.view, { message: '64 bytes at 4096 lie on a GPU, the host cannot read them' })
})

t.test('another thread is sent where a region lies, and nothing that could release it', async (t) => {
  const arena = new Region(wholeOf({ pointer: 4096n, bytes: 256 }, 'host'), new Views(), nothing)
  const region = arena.carve(64, 100, nothing)
  const code = `const { parentPort } = require('node:worker_threads')
    parentPort.once('message', (span) => parentPort.postMessage([span, Object.getPrototypeOf(span) === Object.prototype]))`
  const worker = new Worker(code, { eval: true })
  const exited = once(worker, 'exit')
  worker.postMessage(region)
  const [[span, plain]] = await once(worker, 'message')
  t.ok(plain)
  t.strictSame(span, {
    space: 'host',
    pointer: 4160n,
    bytes: 100,
    owner: { pointer: 4096n, bytes: 256 },
    shared: false,
  })
  await exited
})
