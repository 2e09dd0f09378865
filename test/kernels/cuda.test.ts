import t from 'tap'
import { CUDA_KERNELS, CUDA_OPTIONS, CUDA_SOURCE } from '../../kernels/cuda/source.js'

const DTYPES = ['float32', 'bfloat16', 'float16'] as const

t.test('every kernel that can be asked for is in the source', async (t) => {
  const names = DTYPES.flatMap((from) => [
    CUDA_KERNELS.scan(from),
    ...[true, false].flatMap((vector) => [
      CUDA_KERNELS.momentum(from, vector),
      CUDA_KERNELS.normalize(from, vector),
      CUDA_KERNELS.finish(from, vector),
    ]),
    ...DTYPES.flatMap((to) => [CUDA_KERNELS.adamw(from, to), CUDA_KERNELS.sgd(from, to)]),
  ])
  for (const name of [...names, CUDA_KERNELS.collect()]) t.match(CUDA_SOURCE, `__global__ void ${name}(`)
  t.equal(CUDA_SOURCE.match(/__global__/g)?.length, names.length + 1, 'and no other')
})

t.test('it is compiled for the card at hand, without contraction', async (t) => {
  t.match(CUDA_OPTIONS('9.0'), ['--gpu-architecture=sm_90'])
  t.ok(CUDA_OPTIONS('9.0').includes('--fmad=false'))
})
