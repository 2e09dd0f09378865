import fc from 'fast-check'
import t from 'tap'
import { Region, Views, wholeOf } from '../../src/device/region.js'
import { aligned, Staging } from '../../src/device/staging.js'

const START = 4096n

/** An arena whose memory nobody reads or writes. */
function arena(bytes: number): Staging {
  return new Staging(new Region(wholeOf({ pointer: START, bytes }, 'host'), new Views(), () => {}))
}

/** A reservation that waits; `region` is there once it was granted. */
function waiting(staging: Staging, bytes: number) {
  const asked: { region: Region | undefined; leave: () => void } = { region: undefined, leave: () => {} }
  asked.leave = staging.wait(bytes, (region) => {
    asked.region = region
  })
  return asked
}

const at = (offset: number, bytes: number) => ({ pointer: START + BigInt(offset), bytes, owner: { pointer: START } })

t.test('what was released can be reserved again whole', async (t) => {
  const staging = arena(1024)
  const regions = [100, 200, 300].map((bytes) => staging.tryReserve(bytes))
  t.equal(staging.used, 128 + 256 + 320)
  for (const index of [1, 0, 2]) regions[index]!.release()
  t.equal(staging.used, 0)
  t.match(staging.tryReserve(1024), at(0, 1024))
})

t.test('a reservation waits for room, and nobody overtakes it', async (t) => {
  const staging = arena(256)
  const first = staging.tryReserve(200)!
  const large = waiting(staging, 256)
  const small = waiting(staging, 1)
  t.equal(staging.waiting, 2)
  t.equal(staging.tryReserve(1), undefined, 'there is room for one byte, but others wait')
  first.release()
  t.match(large.region, at(0, 256))
  t.equal(small.region, undefined)
  large.region!.release()
  t.match(small.region, at(0, 1))
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
  const quitter = waiting(staging, 256)
  const next = waiting(staging, 64)
  quitter.leave()
  t.equal(quitter.region, undefined)
  t.match(next.region, at(128, 64))
  next.leave()
  t.equal(staging.used, 192, 'what was granted is not given up any more')
})

t.test('whoever can do without a region is asked to give it back when there is no room', async (t) => {
  const staging = arena(256)
  const spare = staging.tryReserve(128)!
  const asked: number[] = []
  const give = () => {
    asked.push(staging.used)
    staging.pressed.delete(give)
    spare.release()
  }
  staging.pressed.add(give)
  t.match(staging.tryReserve(128), at(128, 128), 'nobody is asked while there is room')
  t.same(asked, [])
  t.match(staging.tryReserve(100), at(0, 100))
  t.same(asked, [256])
  t.equal(staging.tryReserve(1), undefined, 'there is nobody left to be asked')
})

t.test('the memory of an arena that was closed is freed with its last region', async (t) => {
  for (const held of [false, true]) {
    let freed = 0
    const whole = wholeOf({ pointer: START, bytes: 256 }, 'host')
    const staging = new Staging(new Region(whole, new Views(), () => (freed += 1)))
    const region = staging.tryReserve(10)!
    t.ok(staging.has(region))
    t.notOk(staging.has(new Region(wholeOf({ pointer: 1n, bytes: 10 }, 'host'), new Views(), () => {})))
    if (!held) region.release()
    staging.close()
    t.equal(freed, held ? 0 : 1)
    if (held) region.release()
    t.equal(freed, 1)
  }
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
