import type { Socket } from 'node:net'
import t from 'tap'
import { Reception } from '../../src/link/reception.js'
import { encodeWithData } from '../../src/wire/codec.js'
import { normal, RawClient, startService, until } from '../service.js'
import { rawFrame } from './websocket/raw-frame.js'

const GROUPS = [{ name: 'g', algorithm: 'sgd', lr: 0.1, momentum: 0.9 }]
/** Two are large enough to be received in place, the last one is not. */
const SIZES = [100_000, 40_000, 100]
const PARAMETERS = SIZES.map((size, i) => ({ name: `p${i}`, shape: [size], group: 'g' }))
const gradientsOf = (step: number) => SIZES.map((size, i) => normal(10 * step + i, size))

/** The chunks that came the ordinary way, as [parameter, offset]. */
function ordinaryChunks(t: { teardown: (undo: () => void) => void }): [number, number][] {
  const chunks: [number, number][] = []
  const { take } = Reception.prototype
  Reception.prototype.take = function (joined, frame) {
    chunks.push([frame.parameter, frame.offset])
    return take.call(this, joined, frame)
  }
  t.teardown(() => {
    Reception.prototype.take = take
  })
  return chunks
}

t.test('a large gradient is received in place from its first chunk on, with the same digests', async (t) => {
  const service = await startService()
  const chunks = ordinaryChunks(t)
  const digests: string[][] = []
  for (const [run, chunk] of [
    ['whole', 2 ** 20],
    ['chunks', 90_000],
    ['small', 40_000],
  ] as const) {
    const client = await RawClient.connect(service.url)
    await client.open({ run, groups: GROUPS, parameters: PARAMETERS })
    chunks.length = 0
    const steps = [1, 2, 3]
    const told: string[] = []
    for (const step of steps) told.push((await client.step(step, gradientsOf(step), [0, 1, 2], chunk)).digest)
    digests.push(told)
    const large = chunks.filter(([parameter]) => parameter < 2)
    if (run === 'small') t.equal(large.length, 3 * (10 + 4), 'chunks that are small come the ordinary way')
    // The last chunk of a gradient may be too small for a path of its own.
    else
      t.same(
        large.filter(([, offset]) => offset === 0),
        [],
        run,
      )
    t.equal(chunks.filter(([parameter]) => parameter === 2).length, 3, 'a small gradient comes the ordinary way')
    await client.close()
  }
  t.same(digests[1], digests[0])
  t.same(digests[2], digests[0])
  t.equal(service.device.staging.used, 0)
  await service.app.close()
})

t.test('whatever is wrong with a first chunk is told as ever', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'a', groups: GROUPS, parameters: PARAMETERS })
  const data = new Uint8Array(80_000)
  const send = (parameter: number, step: number, offset: number, bytes = data) =>
    client.socket.send(encodeWithData({ type: 'gradient', parameter, step, offset }, bytes))
  send(7, 1, 0)
  t.match(await client.expect('error'), { code: 'PARAMETER_UNKNOWN' })
  send(0, 5, 0)
  t.match(await client.expect('error'), { code: 'STEP_CONFLICT', parameter: 0 })
  send(2, 1, 0)
  t.match(await client.expect('error'), { code: 'SHAPE_MISMATCH', parameter: undefined })
  t.equal(service.device.staging.used, 0)
  t.equal((await client.step(1, gradientsOf(1))).step, 1)
  send(0, 2, 4)
  t.match(await client.expect('error'), { code: 'FRAME_UNEXPECTED' })
  await client.closed()
  await service.app.close()
})

t.test('a connection that ends in the first chunk leaves nothing behind', async (t) => {
  const service = await startService()
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'a', groups: GROUPS, parameters: PARAMETERS })
  const whole = encodeWithData({ type: 'gradient', parameter: 0, step: 1, offset: 0 }, new Uint8Array(400_000))
  const stream: Socket = Reflect.get(client.socket, '_socket')
  stream.write(rawFrame(0x82, Buffer.from(whole), Buffer.from([1, 2, 3, 4])).subarray(0, 200_000))
  await until(() => service.device.staging.used > 0)
  client.socket.terminate()
  await until(() => service.device.staging.used === 0)
  const next = await RawClient.connect(service.url)
  await next.open({ run: 'a', mode: 'resume' })
  t.equal((await next.step(1, gradientsOf(1))).step, 1)
  await next.close()
  await service.app.close()
})
