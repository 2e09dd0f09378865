import fc from 'fast-check'
import t from 'tap'
import { Region, Views, wholeOf } from '../../src/device/region.js'
import { RunStaging } from '../../src/device/run-staging.js'
import { Staging } from '../../src/device/staging.js'

const ARENA = 4096n
const never = new AbortController().signal

/** Memory that nobody reads or writes. */
function memory(pointer: bigint, bytes: number, free = () => {}): Region {
  return new Region(wholeOf({ pointer, bytes }, 'host'), new Views(), free)
}

/** An arena, and what makes runs that share it; `allocated` has the bytes of their own memories that are there. */
function shared(bytes: number) {
  const arena = new Staging(memory(ARENA, bytes))
  const allocated: number[] = []
  const run = (own: number) => {
    const allocate = (bytes: number) => {
      allocated.push(bytes)
      const pointer = BigInt(2 ** 20 * allocated.length)
      return memory(pointer, bytes, () => allocated.splice(allocated.indexOf(bytes), 1))
    }
    return new RunStaging(arena, { bytes: own, allocate })
  }
  return { arena, allocated, run }
}

t.test('the arena comes first, and a run that has nothing there never waits for others', async (t) => {
  const { arena, allocated, run } = shared(256)
  const [holder, other] = [run(256), run(128)]
  const held = holder.tryReserve(256)!
  t.ok(arena.has(held))
  t.equal(other.ownBytes, 0, 'what is not needed is not allocated')
  const own = other.tryReserve(100)!
  t.notOk(arena.has(own))
  t.same([allocated, other.ownBytes], [[128], 128])
  held.release()
  t.ok(arena.has(other.tryReserve(100)!), 'the arena is taken again as soon as it has room')
  own.release()
  other.close()
  t.same([allocated, other.ownBytes], [[], 0])
})

t.test('a gradient that is larger than the arena has the memory of its run', async (t) => {
  const { arena, allocated, run } = shared(256)
  const large = run(1024)
  const first = large.tryReserve(1000)!
  t.notOk(arena.has(first))
  t.equal(large.tryReserve(1000), undefined)
  const second = large.reserve(1000, never)
  const small = large.tryReserve(100)!
  t.ok(arena.has(small), 'a small one of the same run goes on')
  t.equal(arena.waiting, 0, 'one that never fits the arena does not stand in its queue')
  first.release()
  const region = await second
  t.equal(region!.bytes, 1000)
  for (const one of [region!, small]) one.release()
  t.equal(arena.used, 0)
  large.close()
  t.same(allocated, [])
})

t.test('a run with gradients in the arena waits for those, and takes its own memory once there are none', async (t) => {
  const { arena, allocated, run } = shared(256)
  const [one, other] = [run(256), run(256)]
  const [mine, theirs] = [one.tryReserve(128)!, other.tryReserve(128)!]
  const third = one.reserve(200, never)
  t.same([arena.waiting, allocated], [1, []])
  mine.release()
  const region = (await third)!
  t.notOk(arena.has(region), 'the other still holds its half')
  t.same([arena.waiting, allocated], [0, [256]])
  theirs.release()
  // Its own memory is taken, and the arena full: there is room where a region is released first.
  const all = other.tryReserve(256)!
  const fourth = one.reserve(100, never)
  t.equal(arena.waiting, 1)
  all.release()
  t.ok(arena.has((await fourth)!))
})

t.test('a reservation that is given up leaves every queue', async (t) => {
  const { arena, run } = shared(256)
  const [one, other] = [run(256), run(256)]
  const [mine, theirs] = [one.tryReserve(128)!, other.tryReserve(128)!]
  const quit = new AbortController()
  const waiting = [one.reserve(256, quit.signal), one.reserve(200, quit.signal)]
  t.equal(arena.waiting, 2)
  quit.abort()
  t.same(await Promise.all(waiting), [undefined, undefined])
  t.equal(arena.waiting, 0)
  t.equal(await one.reserve(1, quit.signal), undefined, 'an aborted signal reserves nothing')
  for (const region of [mine, theirs]) region.release()
  t.equal(arena.used, 0)
})

t.test('memory that cannot be allocated is an error of whoever asked, now or later', async (t) => {
  const arena = new Staging(memory(ARENA, 256))
  const allocate = () => {
    throw new Error('no memory')
  }
  const run = new RunStaging(arena, { bytes: 512, allocate })
  t.throws(() => run.tryReserve(300), { message: 'no memory' })
  const mine = run.tryReserve(128)!
  const other = arena.tryReserve(128)!
  const waiting = run.reserve(200, never)
  mine.release()
  await t.rejects(waiting, { message: 'no memory' })
  t.equal(arena.waiting, 0)
  other.release()
  t.equal(arena.used, 0)
})

// A gradient is received at its sender's pace, then computed, which needs nobody else.
type Phase = { region: Region; computing: boolean }

t.test('whoever sends goes on, whatever others hold, and in the end all memory is back', async () => {
  const run = fc.record({
    honest: fc.boolean(),
    sizes: fc.array(fc.integer({ min: 1, max: 700 }), { minLength: 1, maxLength: 6 }),
  })
  const arbitrary = fc.record({
    runs: fc.array(run, { minLength: 1, maxLength: 6 }),
    order: fc.infiniteStream(fc.nat()),
  })
  const property = fc.asyncProperty(arbitrary, async ({ runs, order }) => {
    const { arena, allocated, run } = shared(512)
    const quit = new AbortController()
    const trains = runs.map(({ honest, sizes }) => {
      const staging = run(704)
      const state = { staging, left: [...sizes], phases: [] as Phase[], asking: false, honest }
      return state
    })
    type Train = (typeof trains)[number]
    // One turn of a run: it asks for its next gradient, completes the one that comes, or has one computed.
    const turn = async (train: Train, choice: number) => {
      const coming = train.phases.find(({ computing }) => !computing)
      if (coming && train.honest && choice % 2 === 0) coming.computing = true
      else if (train.phases[0]?.computing && choice % 3 === 0) train.phases.shift()!.region.release()
      else if (!coming && !train.asking && train.left.length > 0) {
        train.asking = true
        void train.staging.reserve(train.left.shift()!, quit.signal).then((region) => {
          train.asking = false
          if (region) train.phases.push({ region, computing: false })
        })
      }
      await null
    }
    const finished = (train: Train) => train.left.length + train.phases.length === 0 && !train.asking
    for (let turns = 0; turns < 20_000 && !trains.every((train) => !train.honest || finished(train)); turns++) {
      const choice: number = order.next().value
      await turn(trains[choice % trains.length]!, Math.floor(choice / 7))
    }
    const done = trains.every((train) => !train.honest || finished(train))
    quit.abort()
    for (let i = 0; i < 10; i++) await null
    for (const { phases, staging } of trains) {
      for (const { region } of phases) region.release()
      staging.close()
    }
    return done && arena.used === 0 && arena.waiting === 0 && allocated.length === 0
  })
  await fc.assert(property, { seed: 3, numRuns: 200 })
})
