import t from 'tap'
import { kernelFlops } from '../../kernels/flops.js'
import type { KernelSpec } from '../../kernels/kernel.js'
import { NAMED_COEFFICIENTS, type Triple } from '../../kernels/orthogonalize/coefficients.js'

const DTYPES = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const muon = (coefficients: readonly Triple[]): KernelSpec => ({ kind: 'muon', coefficients, tall: false, ...DTYPES })

/** Runs the loops of a product of a x b and b x c, and counts a multiplication and an addition in each turn. */
function product(a: number, b: number, c: number): number {
  let count = 0
  for (let i = 0; i < a; i++) for (let j = 0; j < c; j++) for (let k = 0; k < b; k++) count += 2
  return count
}

t.test('Newton-Schulz counts every product of its iterations in full', async (t) => {
  const [quintic, cubic] = [NAMED_COEFFICIENTS.keller_jordan.coefficients[0], [1.5, -0.5, 0] as const]
  for (const [m, n] of [
    [3, 5],
    [4, 4],
    [1, 7],
  ] as const) {
    const outer = product(m, n, m) + product(m, m, n)
    const products = 2 * (outer + product(m, m, m)) + outer
    for (const dims of [
      [m, n],
      [n, m],
    ]) {
      t.equal(kernelFlops(muon([quintic, quintic, cubic]), dims), products + 13 * m * n, `${dims}`)
    }
  }
})

t.test('NorMuon adds its statistic', async (t) => {
  const plain = muon([[1.5, -0.5, 0]])
  const normuon: KernelSpec = { ...muon([[1.5, -0.5, 0]]), second_momentum: 'row' } as KernelSpec
  t.equal(kernelFlops(normuon, [7, 3]) - kernelFlops(plain, [7, 3]), 3 * 21 + 9 * 7)
})

t.test('elementwise kernels count each element', async (t) => {
  t.equal(kernelFlops({ kind: 'adamw', ...DTYPES }, [10]), 120)
  t.equal(kernelFlops({ kind: 'adamw', amsgrad: true, ...DTYPES }, [10]), 130)
  t.equal(kernelFlops({ kind: 'rmsprop', ...DTYPES }, [10]), 110)
  t.equal(kernelFlops({ kind: 'sgd', ...DTYPES }, [10]), 70)
  t.equal(kernelFlops({ kind: 'sgd', ...DTYPES }, []), 7, 'a scalar is one element')
})
