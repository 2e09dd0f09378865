import t from 'tap'
import { CUDA_KERNELS, CUDA_OPTIONS, CUDA_SOURCE } from '../../kernels/cuda/source.js'

const DTYPES = ['float32', 'bfloat16', 'float16'] as const
const BUFFERS = ['float32', 'bfloat16'] as const
const ELEMENTWISE = [{ kind: 'adamw' }, { kind: 'adamw', amsgrad: true }, { kind: 'rmsprop' }, { kind: 'sgd' }] as const

t.test('every kernel that can be asked for is in the source', async (t) => {
  const names = DTYPES.flatMap((from) => [
    CUDA_KERNELS.scan(from),
    ...[true, false].flatMap((vector) => [
      ...BUFFERS.flatMap((momentum_dtype) => [
        CUDA_KERNELS.momentum({ gradient_dtype: from, momentum_dtype }, vector),
        CUDA_KERNELS.normalize({ gradient_dtype: from, momentum_dtype }, vector),
      ]),
      CUDA_KERNELS.finish(from, vector),
      CUDA_KERNELS.even(from, vector),
    ]),
    ...DTYPES.flatMap((to) =>
      ELEMENTWISE.map((kind) => CUDA_KERNELS.elementwise({ ...kind, gradient_dtype: from, update_dtype: to })),
    ),
  ])
  names.push(CUDA_KERNELS.collect(), CUDA_KERNELS.second('row'), CUDA_KERNELS.second('col'))
  for (const name of names) t.match(CUDA_SOURCE, `__global__ void ${name}(`)
  t.equal(new Set(names).size, names.length)
  t.equal(CUDA_SOURCE.match(/__global__/g)?.length, names.length, 'and no other')
  t.equal(
    CUDA_KERNELS.momentum({ gradient_dtype: 'float16' }, true),
    CUDA_KERNELS.momentum({ gradient_dtype: 'float16', momentum_dtype: 'float32' }, true),
  )
})

t.test('it is compiled for the card at hand, without contraction', async (t) => {
  t.match(CUDA_OPTIONS('9.0'), ['--gpu-architecture=sm_90'])
  t.ok(CUDA_OPTIONS('9.0').includes('--fmad=false'))
})
