import fc from 'fast-check'
import t from 'tap'
import { aligned, type Slot, Staging } from '../../src/device/staging.js'

const never = new AbortController().signal

t.test('what was released can be reserved again whole', async (t) => {
  const staging = new Staging(1024)
  const slots = await Promise.all([100, 200, 300].map((bytes) => staging.reserve(bytes, never)))
  t.equal(staging.used, 128 + 256 + 320)
  for (const index of [1, 0, 2]) staging.release(slots[index]!)
  t.equal(staging.used, 0)
  t.same(staging.tryReserve(1024), { offset: 0, bytes: 1024 })
})

t.test('a reservation waits for room, and nobody overtakes it', async (t) => {
  const staging = new Staging(256)
  const first = staging.tryReserve(200)!
  const large = staging.reserve(256, never)
  const small = staging.reserve(1, never)
  t.equal(staging.waiting, 2)
  t.equal(staging.tryReserve(1), undefined, 'there is room for one byte, but others wait')
  staging.release(first)
  const granted = await large
  t.same(granted, { offset: 0, bytes: 256 })
  staging.release(granted!)
  t.same(await small, { offset: 0, bytes: 1 })
})

t.test('a waiter that gives up leaves the queue and lets the next one in', async (t) => {
  const staging = new Staging(256)
  staging.tryReserve(128)
  const quitter = new AbortController()
  const refused = staging.reserve(256, quitter.signal)
  const next = staging.reserve(64, never)
  quitter.abort()
  t.equal(await refused, undefined)
  t.same(await next, { offset: 128, bytes: 64 })
  t.equal(await staging.reserve(1, quitter.signal), undefined, 'an aborted signal reserves nothing')
})

t.test('fits tells what can ever be held', async (t) => {
  const staging = new Staging(256)
  t.ok(staging.fits(256))
  t.notOk(staging.fits(257))
})

t.test('slots never overlap and nothing is lost', async () => {
  const operation = fc.record({ bytes: fc.integer({ min: 1, max: 700 }), release: fc.integer({ min: 0, max: 9 }) })
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 80 }), (operations) => {
      const staging = new Staging(2048)
      const held: Slot[] = []
      for (const { bytes, release } of operations) {
        const slot = staging.tryReserve(bytes)
        if (slot) held.push(slot)
        else if (held.length > 0) staging.release(held.splice(release % held.length, 1)[0]!)
        const ranges = held.map(({ offset, bytes }) => [offset, offset + aligned(bytes)]).sort(([a], [b]) => a! - b!)
        const apart = ranges.every(([start, end], i) => end! <= 2048 && (i === 0 || ranges[i - 1]![1]! <= start!))
        const sum = ranges.reduce((total, [start, end]) => total + end! - start!, 0)
        if (!apart || sum !== staging.used) return false
      }
      for (const slot of held) staging.release(slot)
      return staging.tryReserve(2048) !== undefined
    }),
    { seed: 1, numRuns: 300 },
  )
})
