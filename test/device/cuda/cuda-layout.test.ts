import fc from 'fast-check'
import t from 'tap'
import { MAX_BLOCKS, PARTIAL_BYTES } from '../../../kernels/cuda/source.js'
import type { KernelSpec } from '../../../kernels/kernel.js'
import {
  batchesOf,
  blocksFor,
  checkBlocksOf,
  isMuon,
  largest,
  largestOf,
  listsOf,
  packOf,
  partialBytes,
  piecesOf,
  scanBlocks,
  scratchFor,
  slotBytes,
  stateInFlight,
  TOGETHER,
  TOGETHER_ELEMENTS,
  totalOf,
} from '../../../src/device/cuda/cuda-layout.js'
import type { Plan, Task } from '../../../src/optimizer/plan.js'

const DTYPES = { gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' } as const
const MUON: KernelSpec = { kind: 'muon', coefficients: [[2, -1.5, 0.5]], tall: false, ...DTYPES }
const ADAMW: KernelSpec = { kind: 'adamw', ...DTYPES }

function planOf(kernel: KernelSpec, tasks: readonly Task[], scalars: Plan['scalars'] = {}): Plan {
  return { kernel, tasks, scalars, scale: 1, decay: 0, rms_factor: 1 }
}

/** `count` matrices of one shape, one behind the other. */
function matrices(count: number, rows: number, cols: number): Plan {
  const tasks = Array.from({ length: count }, (_, i) => ({ dims: [rows, cols], offset: i * rows * cols }))
  return planOf(MUON, tasks, { output_scale: 1 })
}

t.test('matrices of one shape and factor are one group, and others are not', async (t) => {
  const [first, ...rest] = piecesOf(matrices(3, 24, 40))
  t.same(rest, [])
  t.match(first, { offset: 0, elements: 3 * 24 * 40, groups: [{ rows: 24, cols: 40, offset: 0, count: 3, factor: 1 }] })
  const mixed = planOf(MUON, [
    { dims: [8, 8], offset: 0, output_scale: 2 },
    { dims: [8, 8], offset: 64, output_scale: 2 },
    { dims: [8, 8], offset: 128, output_scale: 3 },
    { dims: [16, 8], offset: 192, output_scale: 3, kernel: { ...MUON, tall: true } },
  ])
  t.match(piecesOf(mixed), [
    {
      elements: 320,
      groups: [
        { count: 2, factor: 2, offset: 0 },
        { count: 1, factor: 3, offset: 128 },
        { count: 1, factor: 3, offset: 192, spec: { tall: true } },
      ],
    },
  ])
})

t.test(
  'a large batch is cut between matrices, a large tensor anywhere, many small matrices by their number',
  async (t) => {
    const experts = piecesOf(matrices(10, 2048, 7168))
    t.same(
      experts.map(({ groups, offset, elements }) => [groups[0]!.count, offset, elements]),
      [4, 4, 2].map((count, i) => [count, i * 4 * 2048 * 7168, count * 2048 * 7168]),
    )
    const embedding = piecesOf(planOf(ADAMW, [{ dims: [20 * 2 ** 20], offset: 0 }]))
    t.same(
      embedding.map(({ offset, elements }) => [offset, elements]),
      [8, 8, 4].map((size, i) => [i * 8 * 2 ** 20, size * 2 ** 20]),
    )
    const heads = piecesOf(matrices(100_000, 1, 2))
    t.same(
      heads.map(({ groups }) => groups.map(({ count }) => count)),
      [[32768], [32768], [32768], [1696]],
    )
  },
)

t.test('a piece knows where the lines of its first matrix are kept', async (t) => {
  const shape = { rows: 2048, cols: 7168 }
  const tasks = Array.from({ length: 6 }, (_, i) => ({
    ...{ dims: [shape.rows, shape.cols], offset: i * shape.rows * shape.cols, line_offset: i * shape.cols },
  }))
  const pieces = piecesOf(planOf(MUON, tasks, { output_scale: 1 }))
  t.same(
    pieces.map(({ groups }) => groups.map(({ lines, count }) => [lines, count])),
    [[[0, 4]], [[4 * 7168, 2]]],
  )
})

t.test('the pieces cover the tensor once and in order, whatever it is made of', async () => {
  const run = fc.record({
    count: fc.integer({ min: 1, max: 40 }),
    rows: fc.integer({ min: 1, max: 3000 }),
    cols: fc.integer({ min: 1, max: 3000 }),
    factor: fc.constantFrom(1, 2),
  })
  fc.assert(
    fc.property(fc.array(run, { minLength: 1, maxLength: 6 }), (runs) => {
      let end = 0
      const tasks = runs.flatMap(({ count, rows, cols, factor }) =>
        Array.from({ length: count }, () => {
          const task = { dims: [rows, cols], offset: end, output_scale: factor }
          end += rows * cols
          return task
        }),
      )
      let at = 0
      for (const { groups, offset, elements } of piecesOf(planOf(MUON, tasks))) {
        if (offset !== at) return false
        for (const group of groups) {
          if (group.offset !== at || !isMuon(group)) return false
          at += group.rows * group.cols * group.count
        }
        if (at !== offset + elements) return false
      }
      return at === end
    }),
    { seed: 3 },
  )
})

t.test('a batch closes when it has enough elements', async (t) => {
  const pieces = [5, 4, 9, 1, 1].map((millions) => ({ elements: millions * 2 ** 20 }))
  t.same(
    batchesOf(pieces).map((batch) => batch.map(({ elements }) => elements / 2 ** 20)),
    [[5, 4], [9], [1, 1]],
  )
})

t.test('lists have the same shapes side by side, and no more of them than fill the chip', async (t) => {
  const matrix = (rows: number, cols: number) => ({
    group: { spec: MUON, rows, cols, offset: 0, lines: 0, count: 1, factor: 1 },
  })
  const shapes = listsOf([
    matrix(8, 8),
    matrix(4096, 8192),
    matrix(8, 16),
    matrix(4096, 8192),
    matrix(8, 8),
    matrix(4096, 8192),
  ])
  t.same(
    shapes.map((list) => list.map(({ group }) => `${group.rows}x${group.cols}`)),
    [
      ['8x8', '8x8', '8x16', '4096x8192'],
      ['4096x8192', '4096x8192'],
    ],
  )
  const many = listsOf(Array.from({ length: 70 }, () => matrix(8, 8)))
  t.same(
    many.map((list) => list.length),
    [32, 32, 6],
  )
})

t.test('threads take four elements at once where every matrix starts and ends on four', async (t) => {
  const group = { spec: MUON, rows: 6, cols: 6, offset: 0, lines: 0, count: 2, factor: 1 }
  t.equal(packOf(group), 4)
  t.equal(packOf({ ...group, offset: 2 }), 1)
  t.equal(packOf({ ...group, cols: 5 }), 1)
  t.equal(packOf({ ...group, spec: ADAMW }), 1)
  t.equal(blocksFor({ ...group, rows: 256, cols: 256 }), 16)
  t.equal(scanBlocks(1), 1)
  t.equal(scanBlocks(2 ** 40), MAX_BLOCKS)
  t.equal(checkBlocksOf(piecesOf(matrices(3, 256, 256))), 3 * 16)
  t.equal(partialBytes(48), (2 * MAX_BLOCKS + 48) * PARTIAL_BYTES)
})

const demand = (plan: Plan, elements: number) => ({
  plan,
  ...{ gradient_bytes: 2 * elements, update_bytes: 4 * elements, state_bytes: 8 * elements },
})

t.test('scratch has room for every group of jobs that is no larger than what was asked for', async () => {
  const side = fc.integer({ min: 1, max: 96 }).map((n) => n * 8)
  const shape = fc.record({ rows: side, cols: side, count: fc.integer({ min: 1, max: 5 }) })
  const group = { jobs: 8, bytes: 2 ** 22 }
  fc.assert(
    fc.property(fc.array(shape, { minLength: 1, maxLength: 12 }), (shapes) => {
      const demands = shapes.map(({ rows, cols, count }) => demand(matrices(count, rows, cols), rows * cols * count))
      const { gradients, updates, partials, products } = scratchFor(largestOf(demands, 'own'), group)
      const taken: typeof demands = []
      let bytes = 0
      for (const next of demands) {
        if (taken.length === group.jobs || bytes >= group.bytes) break
        taken.push(next)
        bytes += next.gradient_bytes
      }
      const sum = (of: (one: (typeof demands)[number]) => number) => taken.reduce((total, one) => total + of(one), 0)
      const pieces = taken.map(({ plan }) => piecesOf(plan))
      const all = pieces
        .flat()
        .flatMap(({ groups }) => groups.flatMap((group) => Array.from({ length: group.count }, () => ({ group }))))
      const lists = listsOf(all).map((list) =>
        list.reduce((total, { group }) => total + slotBytes(group.rows, group.cols), 0),
      )
      return (
        sum((one) => Math.ceil(one.gradient_bytes / 256) * 256) <= gradients &&
        sum((one) => Math.ceil(one.update_bytes / 256) * 256) <= updates &&
        pieces.reduce((total, of) => total + partialBytes(checkBlocksOf(of)), 0) <= partials &&
        Math.max(...lists) <= products
      )
    }),
    { seed: 5 },
  )
})

t.test(
  'what goes through ONNX Runtime has room for one matrix, and what that takes beside it is counted',
  async (t) => {
    const elements = 33 * 77
    const of = largestOf([demand(matrices(1, 33, 77), elements)], 'own')
    const half = Math.ceil((elements * 2) / 256) * 256
    t.match(of, { slot: 0, alone: 2 * half, provider: 2 * (2 * elements + 4 * 33 * 33), state: 4 })
    t.same(largestOf([demand(matrices(1, 64, 64), 4096)], 'own_but_products').slot, 0)
    const scratch = scratchFor(of, { jobs: 1, bytes: 1 })
    t.equal(scratch.products, 2 * half)
    t.equal(
      totalOf(scratch),
      Object.values(scratch).reduce((sum, bytes) => sum + bytes, 0),
    )
    t.equal(stateInFlight(of, { jobs: 3, bytes: 2 ** 30 }), 3 * 8 * elements)
    t.same(largest([]), largest([largest([])]))
  },
)

t.test('ONNX Runtime alone has room for the largest task, or for a slice of it', async (t) => {
  t.match(largestOf([demand(matrices(3, 33, 77), 3 * 33 * 77)], 'onnx'), {
    ...{ slot: 0, gradient: 2 * 3 * 33 * 77, alone: 4 * 33 * 77, provider: 40 * 33 * 77 },
  })
  const embedding = planOf(ADAMW, [{ dims: [2 ** 20], offset: 0 }])
  t.match(largestOf([demand(embedding, 2 ** 20)], 'onnx'), { alone: 4 * 2 ** 18, provider: 40 * 2 ** 18 })
})

t.test('a list takes no more than its limits allow, however large the matrices are', async (t) => {
  const elements = 8192 * 8192
  const { products } = scratchFor(largestOf([demand(matrices(1, 8192, 8192), elements)], 'own'), {
    ...{ jobs: 8, bytes: 2 ** 28 },
  })
  t.ok(products >= slotBytes(8192, 8192))
  t.ok(products <= (slotBytes(8192, 8192) / elements) * TOGETHER_ELEMENTS + TOGETHER * 9 * 256)
})
