import t from 'tap'
import { expandCoefficients, NAMED_COEFFICIENTS, type Triple } from '../../../kernels/orthogonalize/coefficients.js'
import { isSmall, SMALL_SIDE, segmentsOf, smallBlocks, smallBytes } from '../../../src/device/cuda/small.js'

t.test('the shorter side decides, whichever it is', async (t) => {
  t.equal(SMALL_SIDE, 64)
  for (const [rows, cols] of [
    [1, 1],
    [1, 10_000],
    [64, 64],
    [64, 10_000],
  ] as const) {
    t.ok(isSmall(rows, cols))
    t.ok(isSmall(cols, rows))
    t.equal(smallBlocks(rows, cols), smallBlocks(cols, rows))
    t.equal(smallBytes(rows, cols), smallBytes(cols, rows))
  }
  t.notOk(isSmall(65, 65))
})

t.test('blocks share the longer side, and a workspace has their parts of the Gram matrix', async (t) => {
  t.same(
    [1, 128, 129, 701, 128 * 128, 10 ** 6].map((length) => smallBlocks(17, length)),
    [1, 1, 2, 6, 128, 128],
  )
  t.equal(smallBytes(64, 64), 2 * 4 * 64 ** 2 + (1 + 3) * 8 * 64 ** 2)
  t.equal(smallBytes(1, 1), 4 * 256, 'each part starts on 256 bytes')
})

t.test('every named set goes on from one Gram matrix, and longer ones start anew in time', async (t) => {
  for (const { coefficients, ns_steps } of Object.values(NAMED_COEFFICIENTS))
    t.same(segmentsOf(expandCoefficients(coefficients, ns_steps)), [ns_steps])
  const steep: Triple = [1e3, -1, 0]
  const flat: Triple = [1, 0, 0]
  t.same(segmentsOf([steep, flat, steep]), [2, 1], 'a² of both is above 1e10')
  t.same(segmentsOf([[1e6, 0, 0], flat]), [1, 1], 'an iteration that is above it by itself is alone')
  t.same(segmentsOf([[0, 1, 0], flat]), [2])
  t.same(segmentsOf(new Array<Triple>(20).fill([3.4445, -4.775, 2.0315])), [9, 9, 2])
})
