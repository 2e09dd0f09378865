import fc from 'fast-check'
import t from 'tap'
import {
  checkBlocksOf,
  listsOf,
  partialBytes,
  piecesOf,
  TOGETHER,
  TOGETHER_ELEMENTS,
} from '../../../src/device/cuda/pieces.js'
import {
  largest,
  largestOf,
  scratchFor,
  stateInFlight,
  totalOf,
  workspaceBytes,
} from '../../../src/device/cuda/scratch.js'
import { isSmall, SMALL_TOGETHER, smallBytes } from '../../../src/device/cuda/small.js'
import type { Plan } from '../../../src/optimizer/plan.js'
import { ADAMW, matrices, planOf } from './plans.js'

const demand = (plan: Plan, elements: number) => ({
  plan,
  ...{ gradient_bytes: 2 * elements, update_bytes: 4 * elements, state_bytes: 8 * elements },
})

t.test('scratch has room for every group of jobs that is no larger than what was asked for', async () => {
  const side = fc.integer({ min: 1, max: 768 })
  const shape = fc.record({ rows: side, cols: side, count: fc.integer({ min: 1, max: 5 }) })
  const limit = { jobs: 8, bytes: 2 ** 22 }
  fc.assert(
    fc.property(fc.array(shape, { minLength: 1, maxLength: 12 }), (shapes) => {
      const demands = shapes.map(({ rows, cols, count }) => demand(matrices(count, rows, cols), rows * cols * count))
      const { gradients, updates, partials, products, full } = scratchFor(largestOf(demands, 'own'), limit)
      const taken: typeof demands = []
      let bytes = 0
      for (const next of demands) {
        if (taken.length === limit.jobs || bytes >= full) break
        taken.push(next)
        bytes += next.gradient_bytes
      }
      const sum = (of: (one: (typeof demands)[number]) => number) => taken.reduce((total, one) => total + of(one), 0)
      const pieces = taken.map(({ plan }) => piecesOf(plan))
      const all = pieces
        .flat()
        .flatMap(({ stacks }) => stacks.flatMap((stack) => Array.from({ length: stack.count }, () => ({ stack }))))
      const bytesOf = (few: typeof all, workspaceOf: typeof workspaceBytes) =>
        listsOf(few, { room: products, workspaceOf }).map((list) =>
          list.reduce((total, { stack }) => total + workspaceOf(stack.rows, stack.cols), 0),
        )
      const small = all.filter(({ stack }) => isSmall(stack.rows, stack.cols))
      const large = all.filter(({ stack }) => !isSmall(stack.rows, stack.cols))
      const lists = [...bytesOf(small, smallBytes), ...bytesOf(large, workspaceBytes)]
      return (
        sum((one) => Math.ceil(one.gradient_bytes / 256) * 256) <= gradients &&
        sum((one) => Math.ceil(one.update_bytes / 256) * 256) <= updates &&
        pieces.reduce((total, of) => total + Math.ceil(partialBytes(checkBlocksOf(of)) / 256) * 256, 0) <= partials &&
        Math.max(...lists) <= products
      )
    }),
    { seed: 5 },
  )
})

t.test(
  'what goes through ONNX Runtime has room for one matrix, and what that takes beside it is counted',
  async (t) => {
    const elements = 65 * 77
    const of = largestOf([demand(matrices(1, 65, 77), elements)], 'own_but_products')
    const half = Math.ceil((elements * 2) / 256) * 256
    t.match(of, { workspace: 0, alone: 2 * half, small: 0, provider: 2 * (2 * elements + 4 * 65 * 65), stateRatio: 4 })
    const large = demand(matrices(1, 128, 128), 128 * 128)
    t.same(largestOf([large], 'own_but_products').workspace, 0)
    t.match(largestOf([large], 'own'), { workspace: workspaceBytes(128, 128), alone: 0, provider: 0 })
    t.equal(workspaceBytes(65, 77), workspaceBytes(72, 80) + half, 'and zeros are added to the others')
    const scratch = scratchFor(of, { jobs: 1, bytes: 1 })
    t.equal(scratch.products, 2 * half)
    t.equal(
      totalOf(scratch),
      scratch.gradients + scratch.updates + scratch.partials + scratch.products + scratch.provider,
    )
    t.equal(scratchFor(of, { jobs: 8, bytes: 2 ** 30 }).full, 3 * 2 * elements, 'four of the largest fit')
    t.equal(stateInFlight(of, { jobs: 3, bytes: 2 ** 30 }), 3 * 8 * elements)
    t.same(largest([]), largest([largest([])]))
  },
)

t.test('a matrix whose shorter side is small takes a workspace of its own kind on every card', async (t) => {
  const limit = { jobs: 8, bytes: 2 ** 28 }
  for (const kernels of ['own', 'own_but_products'] as const) {
    const of = largestOf([demand(matrices(2, 64, 3000), 2 * 64 * 3000), demand(matrices(1, 7, 1), 7)], kernels)
    t.match(of, { small: smallBytes(64, 3000), workspace: 0, workspaces: 0, alone: 0, provider: 0 })
    t.equal(scratchFor(of, limit).products, 64 * 2 ** 20, 'a list is cut where it has so many bytes')
    const few = largestOf([demand(matrices(1, 7, 1), 7)], kernels)
    t.equal(scratchFor(few, limit).products, SMALL_TOGETHER * smallBytes(7, 1))
    const one = largestOf([demand(matrices(1, 64, 2 ** 18), 2 ** 24)], kernels)
    t.equal(scratchFor(one, limit).products, smallBytes(64, 2 ** 18), 'one matrix always has room')
  }
  const large = largestOf([demand(matrices(1, 4096, 4096), 2 ** 24)], 'own')
  const both = largest([large, largestOf([demand(matrices(1, 1, 1), 1)], 'own')])
  t.equal(scratchFor(both, limit).products, scratchFor(large, limit).products, 'small ones beside it take nothing more')
})

t.test('ONNX Runtime alone has room for the largest task, or for a slice of it', async (t) => {
  t.match(largestOf([demand(matrices(3, 33, 77), 3 * 33 * 77)], 'onnx'), {
    ...{ workspace: 0, gradient: 2 * 3 * 33 * 77, alone: 4 * 33 * 77, provider: 40 * 33 * 77 },
  })
  const embedding = planOf(ADAMW, [{ dims: [2 ** 20], offset: 0 }])
  t.match(largestOf([demand(embedding, 2 ** 20)], 'onnx'), { alone: 4 * 2 ** 18, provider: 40 * 2 ** 18 })
})

t.test('a list takes no more than its limits allow, however large the matrices are', async (t) => {
  const elements = 8192 * 8192
  const { products } = scratchFor(largestOf([demand(matrices(1, 8192, 8192), elements)], 'own'), {
    ...{ jobs: 8, bytes: 2 ** 28 },
  })
  t.ok(products >= workspaceBytes(8192, 8192))
  t.ok(products <= (workspaceBytes(8192, 8192) / elements) * TOGETHER_ELEMENTS + TOGETHER * 10 * 256)
})
