import fc from 'fast-check'
import t from 'tap'
import { Region, Views, wholeOf } from '../../src/device/region.js'
import { aligned, Staging } from '../../src/device/staging.js'

const never = new AbortController().signal
const START = 4096n

/** An arena whose memory nobody reads or writes. */
function arena(bytes: number): Staging {
  return new Staging(new Region(wholeOf({ pointer: START, bytes }, 'host'), new Views(), () => {}))
}

const at = (offset: number, bytes: number) => ({ pointer: START + BigInt(offset), bytes, owner: { pointer: START } })

t.test('what was released can be reserved again whole', async (t) => {
  const staging = arena(1024)
  const regions = await Promise.all([100, 200, 300].map((bytes) => staging.reserve(bytes, never)))
  t.equal(staging.used, 128 + 256 + 320)
  for (const index of [1, 0, 2]) regions[index]!.release()
  t.equal(staging.used, 0)
  t.match(staging.tryReserve(1024), at(0, 1024))
})

t.test('a reservation waits for room, and nobody overtakes it', async (t) => {
  const staging = arena(256)
  const first = staging.tryReserve(200)!
  const large = staging.reserve(256, never)
  const small = staging.reserve(1, never)
  t.equal(staging.waiting, 2)
  t.equal(staging.tryReserve(1), undefined, 'there is room for one byte, but others wait')
  first.release()
  const granted = await large
  t.match(granted, at(0, 256))
  granted!.release()
  t.match(await small, at(0, 1))
})

t.test('memory is free again with the last of its references', async (t) => {
  const staging = arena(256)
  const first = staging.tryReserve(256)!
  const second = first.retain()
  first.release()
  t.same([staging.used, staging.tryReserve(1)], [256, undefined])
  second.release()
  t.match(staging.tryReserve(256), at(0, 256))
})

t.test('a waiter that gives up leaves the queue and lets the next one in', async (t) => {
  const staging = arena(256)
  staging.tryReserve(128)
  const quitter = new AbortController()
  const refused = staging.reserve(256, quitter.signal)
  const next = staging.reserve(64, never)
  quitter.abort()
  t.equal(await refused, undefined)
  t.match(await next, at(128, 64))
  t.equal(await staging.reserve(1, quitter.signal), undefined, 'an aborted signal reserves nothing')
})

t.test('fits tells what can ever be held', async (t) => {
  const staging = arena(256)
  t.ok(staging.fits(256))
  t.notOk(staging.fits(257))
})

t.test('regions of an arena never overlap, come back once, and nothing is lost', async () => {
  const capacity = 2048
  const operation = fc.record({
    bytes: fc.integer({ min: 1, max: 700 }),
    what: fc.constantFrom('reserve', 'retain', 'release'),
    which: fc.nat(),
  })
  /** Whether these regions lie apart, within the arena, and are all that it has given away. */
  const sound = (regions: Iterable<Region>, used: number) => {
    const ranges = [...regions].map(({ pointer, bytes }) => [Number(pointer - START), aligned(bytes)] as const)
    const sorted = ranges.sort(([a], [b]) => a - b)
    let end = 0
    for (const [offset, bytes] of sorted) {
      if (offset < end || offset % 64 !== 0) return false
      end = offset + bytes
    }
    return end <= capacity && ranges.reduce((sum, [, bytes]) => sum + bytes, 0) === used
  }
  const throws = (work: () => unknown) => {
    try {
      work()
      return false
    } catch {
      return true
    }
  }
  fc.assert(
    fc.property(fc.array(operation, { maxLength: 80 }), (operations) => {
      const staging = arena(capacity)
      /** One entry for each reference. */
      const held: Region[] = []
      for (const { bytes, what, which } of operations) {
        const index = which % held.length
        if (what === 'reserve' || held.length === 0) {
          const region = staging.tryReserve(bytes)
          if (region) held.push(region)
        } else if (what === 'retain') held.push(held[index]!.retain())
        else {
          const [region] = held.splice(index, 1)
          region!.release()
          if (!held.includes(region!) && !throws(() => region!.release())) return false
        }
        if (!sound(new Set(held), staging.used)) return false
      }
      for (const region of held) region.release()
      return staging.used === 0 && staging.tryReserve(capacity) !== undefined
    }),
    { seed: 1, numRuns: 300 },
  )
})
