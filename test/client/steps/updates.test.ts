import fc from 'fast-check'
import t from 'tap'
import type { Bound } from '../../../src/client/steps/parameter.js'
import { Updates } from '../../../src/client/steps/updates.js'
import { chunksOf } from '../../../src/wire/chunks.js'
import type { UpdateFrame } from '../../../src/wire/frame.js'
import { Ranges } from '../../../src/wire/ranges.js'

const parameters = (sizes: number[]): Bound[] =>
  sizes.map((size, index) => ({
    index,
    name: `p${index}`,
    size,
    elements: size,
    ranges: Ranges.whole(size),
    data: new Float32Array(size),
    gradient_dtype: 'float32',
    update_dtype: 'float32',
  }))

/** The frames of an update that adds 1 to every element. */
function frames({ index, size }: Bound, step: number, chunk_bytes: number): UpdateFrame[] {
  const bytes = new Uint8Array(new Float32Array(size).fill(1).buffer)
  return [...chunksOf(bytes.length, chunk_bytes)].map(({ offset, length }) => ({
    type: 'update',
    parameter: index,
    step,
    offset,
    ...(offset === 0 && { scale: 1, decay: 0 }),
    data: bytes.subarray(offset, offset + length),
  }))
}

t.test('each update is applied once, through any number of interrupted and repeated deliveries', (t) => {
  const delivery = fc.record({
    chunk_bytes: fc.integer({ min: 1, max: 64 }),
    frames: fc.nat(60),
    turns: fc.infiniteStream(fc.nat(2)),
  })
  fc.assert(
    fc.property(fc.array(delivery, { maxLength: 6 }), (deliveries) => {
      const bound = parameters([1, 7, 20])
      const updates = new Updates(bound, 1)
      for (const { chunk_bytes, frames: most, turns } of [
        ...deliveries,
        { chunk_bytes: 8, frames: 1000, turns: undefined },
      ]) {
        const queues = bound.map((parameter) => frames(parameter, 1, chunk_bytes))
        for (let taken = 0; taken < most && queues.some((queue) => queue.length > 0); taken++) {
          // Chunks of different parameters come in any order; one parameter's chunks come in theirs.
          const turn = turns?.next().value ?? 0
          const queue = [...queues.slice(turn), ...queues].find(({ length }) => length > 0) ?? []
          const frame = queue.shift()
          if (frame !== undefined) updates.take(frame)
        }
        updates.forget()
      }
      return updates.applied === 3 && bound.every(({ data }) => data.every((value) => value === 1))
    }),
    { seed: 3, numRuns: 300 },
  )
  t.end()
})

t.test('the next step begins with nothing applied', (t) => {
  const [bound] = parameters([3])
  const updates = new Updates([bound], 1)
  for (const step of [1, 2]) {
    for (const frame of frames(bound, step, 64)) t.equal(updates.take(frame), true)
    t.equal(updates.has(0), true)
    updates.next(step + 1)
    t.equal(updates.has(0), false)
  }
  t.same([...bound.data], [2, 2, 2])
  t.end()
})

t.test('an update without data applies its row factors, once', (t) => {
  const [bound] = parameters([4])
  bound.data.fill(8)
  const updates = new Updates([bound], 1)
  const rows = Buffer.concat([Buffer.from([0]), new Uint8Array(Float32Array.of(1, 0.5).buffer)]).subarray(1)
  const frame: UpdateFrame = { type: 'update', parameter: 0, step: 1, offset: 0, scale: 0, decay: 0, row_scale: rows }
  t.equal(updates.take(frame), true)
  t.equal(updates.take(frame), true)
  t.same([...bound.data], [8, 8, 4, 4])
  t.end()
})

t.test('what no service sends is refused, and no weight moves', (t) => {
  const [bound] = parameters([4])
  const frame = (change: Partial<UpdateFrame>): UpdateFrame => ({ ...frames(bound, 1, 8)[0], ...change })
  const data = new Uint8Array(8)
  const table: [title: string, frames: UpdateFrame[], code: string, message: RegExp][] = [
    ['unknown parameter', [frame({ parameter: 1 })], 'PARAMETER_UNKNOWN', /parameter 1/],
    ['another step', [frame({ step: 2 })], 'FRAME_UNEXPECTED', /step 2, expected 1/],
    ['no beginning', [frame({ offset: 8 })], 'FRAME_UNEXPECTED', /offset 8, expected 0/],
    ['no scale', [frame({ scale: undefined })], 'FRAME_UNEXPECTED', /no scale or decay/],
    ['no decay', [frame({ decay: undefined })], 'FRAME_UNEXPECTED', /no scale or decay/],
    ['a gap', [frame({}), frame({ offset: 12, data })], 'FRAME_UNEXPECTED', /offset 12, expected 8/],
    ['nothing', [frame({}), frame({ offset: 8, data: undefined })], 'FRAME_UNEXPECTED', /empty chunk/],
    ['too much', [frame({ data: new Uint8Array(20) })], 'SHAPE_MISMATCH', /20 bytes/],
  ]
  for (const [title, sent, code, message] of table) {
    const updates = new Updates([bound], 1)
    t.throws(() => sent.map((each) => updates.take(each)), { code, message }, title)
    t.equal(updates.applied, 0)
  }
  t.same([...bound.data], [0, 0, 0, 0])
  t.end()
})
