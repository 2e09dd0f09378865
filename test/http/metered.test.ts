import { Socket } from 'node:net'
import t from 'tap'
import { Meter } from '../../src/access/meter.js'
import { Rate } from '../../src/access/rate.js'
import { BodyMeter } from '../../src/http/metered.js'

async function* pieces(count: number) {
  for (let i = 0; i < count; i += 1) yield Uint8Array.of(i)
}

t.test('pieces pass as they are, and are counted, where nothing is owed', async (t) => {
  const rate = new Rate(() => 1000)
  const meter = new BodyMeter(new Meter(rate), new Socket())
  const passed: number[] = []
  for await (const [value] of meter.pass(pieces(3))) passed.push(value!)
  t.same(passed, [0, 1, 2])
  t.notOk(meter.heldBack())
})

t.test('whoever is made to wait is told from who is slow, and one that leaves waits no longer', async (t) => {
  const rate = new Rate(() => 1)
  rate.spend(1e6)
  const socket = new Socket()
  const meter = new BodyMeter(new Meter(new Rate(() => undefined), rate), socket)
  const first = meter.pass(pieces(3)).next()
  await new Promise(setImmediate)
  t.ok(meter.heldBack(), 'the debt takes eleven days')
  t.ok(meter.heldBack(), 'as long as it waits')
  socket.emit('close')
  t.same(await first, { done: true, value: undefined })
  t.ok(meter.heldBack(), 'it has waited since')
  t.notOk(meter.heldBack())
  t.equal(socket.listenerCount('close'), 0)
})
