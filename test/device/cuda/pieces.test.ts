import fc from 'fast-check'
import t from 'tap'
import { MAX_BLOCKS, PARTIAL_BYTES } from '../../../kernels/cuda/source.js'
import {
  batchesOf,
  blocksFor,
  checkBlocksOf,
  isMuon,
  listsOf,
  packOf,
  partialBytes,
  piecesOf,
  scanBlocks,
  scannedInPassing,
} from '../../../src/device/cuda/pieces.js'
import { ADAMW, MUON, matrices, planOf } from './plans.js'

t.test('matrices of one shape and factor are one stack, and others are not', async (t) => {
  const [first, ...rest] = piecesOf(matrices(3, 24, 40))
  t.same(rest, [])
  t.match(first, { offset: 0, elements: 3 * 24 * 40, stacks: [{ rows: 24, cols: 40, offset: 0, count: 3, factor: 1 }] })
  const mixed = planOf(MUON, [
    { dims: [8, 8], offset: 0, output_scale: 2 },
    { dims: [8, 8], offset: 64, output_scale: 2 },
    { dims: [8, 8], offset: 128, output_scale: 3 },
    { dims: [16, 8], offset: 192, output_scale: 3, kernel: { ...MUON, tall: true } },
  ])
  t.match(piecesOf(mixed), [
    {
      elements: 320,
      stacks: [
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
      experts.map(({ stacks, offset, elements }) => [stacks[0]!.count, offset, elements]),
      [5, 5].map((count, i) => [count, i * 5 * 2048 * 7168, count * 2048 * 7168]),
    )
    const embedding = piecesOf(planOf(ADAMW, [{ dims: [20 * 2 ** 20], offset: 0 }]))
    t.same(
      embedding.map(({ offset, elements }) => [offset, elements]),
      [8, 8, 4].map((size, i) => [i * 8 * 2 ** 20, size * 2 ** 20]),
    )
    const heads = piecesOf(matrices(100_000, 1, 2))
    t.same(
      heads.map(({ stacks }) => stacks.map(({ count }) => count)),
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
    pieces.map(({ stacks }) => stacks.map(({ lines, count }) => [lines, count])),
    [[[0, 5]], [[5 * 7168, 1]]],
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
      for (const { stacks, offset, elements } of piecesOf(planOf(MUON, tasks))) {
        if (offset !== at) return false
        for (const stack of stacks) {
          if (stack.offset !== at || !isMuon(stack)) return false
          at += stack.rows * stack.cols * stack.count
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

t.test('lists have the same shapes side by side, as many as there is room for, and cost least', async (t) => {
  const matrix = (rows: number, cols: number) => ({
    stack: { spec: MUON, rows, cols, offset: 0, lines: 0, count: 1, factor: 1 },
  })
  const workspaces = { room: 2 * 4096 * 8192, workspaceOf: (rows: number, cols: number) => rows * cols }
  const six = [
    ...[matrix(8, 8), matrix(4096, 8192), matrix(8, 16)],
    ...[matrix(4096, 8192), matrix(8, 8), matrix(4096, 8192)],
  ]
  const shapes = listsOf(six, workspaces)
  t.same(
    shapes.map((list) => list.map(({ stack }) => `${stack.rows}x${stack.cols}`)),
    [
      ['8x8', '8x8', '8x16', '4096x8192'],
      ['4096x8192', '4096x8192'],
    ],
  )
  t.same(
    listsOf(six, { ...workspaces, room: 130 }).map(({ length }) => length),
    [2, 1, 1, 1, 1],
    'and a list whose workspaces find room',
  )
  const many = listsOf(
    Array.from({ length: 70 }, () => matrix(8, 8)),
    workspaces,
  )
  t.same(
    many.map((list) => list.length),
    [6, 32, 32],
  )
  const most = 50
  t.same(
    listsOf(many.flat(), { ...workspaces, most }).map((list) => list.length),
    [20, 50],
  )
  const some = { ...workspaces, room: 11 * 64 }
  const rounds = (count: number) => Math.ceil((36 * count) / 66)
  for (const [count, lengths] of [
    [48, [4, 11, 11, 11, 11]],
    [11, [11]],
    [1, [1]],
  ] as const) {
    const found = listsOf(many.flat().slice(0, count), { ...some, costOf: () => rounds }).map((list) => list.length)
    const cost = (of: readonly number[]) => of.reduce((sum, length) => sum + rounds(length), 0)
    t.equal(
      found.reduce((sum, length) => sum + length, 0),
      count,
    )
    t.ok(cost(found) <= cost(lengths) && Math.max(...found) <= 11, `${count} are ${found}`)
  }
  const hundred = listsOf([...many.flat(), ...many.flat()], { ...some, costOf: () => rounds }).map(
    ({ length }) => length,
  )
  t.same(hundred.filter((length) => length === 11).length >= 9, true, 'very many are cut alike but for the last few')
  const mixed = [...many.flat().slice(0, 9), matrix(8, 16)]
  t.same(
    listsOf(mixed, { ...some, room: 10 * 64 }).map((list) => list.length),
    [9, 1],
    'matrices of one shape that fit together stay together',
  )
})

t.test('threads take four elements at once where every matrix starts and ends on four', async (t) => {
  const stack = { spec: MUON, rows: 6, cols: 6, offset: 0, lines: 0, count: 2, factor: 1 }
  t.equal(packOf(stack), 4)
  t.equal(packOf({ ...stack, offset: 2 }), 1)
  t.equal(packOf({ ...stack, cols: 5 }), 1)
  t.equal(packOf({ ...stack, spec: ADAMW }), 1)
  t.equal(blocksFor({ ...stack, rows: 256, cols: 256 }), 16)
  t.equal(scanBlocks(1), 1)
  t.equal(scanBlocks(2 ** 40), MAX_BLOCKS)
  t.equal(checkBlocksOf(piecesOf(matrices(3, 256, 256))), 3 * 16)
  t.equal(partialBytes(48), (2 * MAX_BLOCKS + 2 * 48) * PARTIAL_BYTES)
})

t.test('tensors whose every matrix starts and ends on four elements are scanned in passing', async (t) => {
  const of = (plan: ReturnType<typeof planOf>) => scannedInPassing(piecesOf(plan))
  t.same(of(matrices(3, 24, 40)), { gradient: true, update: true })
  t.same(of(matrices(3, 24, 41)), { gradient: true, update: true })
  t.same(of(matrices(3, 23, 41)), { gradient: false, update: false })
  const odd = [
    { dims: [8, 8], offset: 0 },
    { dims: [3, 3], offset: 64 },
  ]
  t.same(of(planOf(MUON, odd)), { gradient: false, update: false })
  t.same(of(planOf({ ...MUON, second_momentum: 'row' }, odd.slice(0, 1))), { gradient: true, update: false })
  t.same(of(planOf(ADAMW, [{ dims: [64], offset: 0 }])), { gradient: false, update: false })
})
