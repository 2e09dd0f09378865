import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import t from 'tap'
import { CUDA_KERNELS, LIST_BYTES, mostItems } from '../../kernels/cuda/entry-points.js'
import {
  GEMM_CLUSTER,
  GEMM_KERNEL,
  GEMM_MODES,
  GEMM_SHARED_BYTES,
  GEMM_THREADS,
  GEMM_TILE,
} from '../../kernels/cuda/gemm.js'
import { CUDA_OPTIONS, PARTIAL_BYTES, RESULT_BYTES, THREADS } from '../../kernels/cuda/source.js'
import { SECOND_MOMENTUM_FLOOR } from '../../kernels/normuon.js'
import { CUDA_SOURCE, GEMM_SOURCE } from '../../src/device/cuda/sources.js'

const DTYPES = ['float32', 'bfloat16', 'float16'] as const
const BUFFERS = ['float32', 'bfloat16'] as const
const ELEMENTWISE = [{ kind: 'adamw' }, { kind: 'adamw', amsgrad: true }, { kind: 'rmsprop' }, { kind: 'sgd' }] as const
const FILES = readdirSync('kernels/cuda').filter((name) => name.endsWith('.cu'))

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

t.test('every .cu file is part of what is compiled, and npm ships it', async (t) => {
  for (const file of FILES) {
    const text = readFileSync(`kernels/cuda/${file}`, 'utf8')
    t.equal([CUDA_SOURCE, GEMM_SOURCE].filter((source) => source.includes(text)).length, 1, file)
  }
  const { stdout } = spawnSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], { encoding: 'utf8' })
  const [packed]: { files: { path: string }[] }[] = JSON.parse(stdout)
  const shipped = packed!.files.map(({ path }) => path).filter((path) => path.endsWith('.cu'))
  t.same(shipped.sort(), FILES.map((file) => `kernels/cuda/${file}`).sort())
})

/** The value of `name = number` in a source. */
function constant(source: string, name: string): number {
  const [, value] = new RegExp(`\\b${name} = (\\d+)\\b`).exec(source) ?? []
  return Number(value)
}

/** Bytes of a struct of which every member has 8. */
function structBytes(source: string, name: string): number {
  const [, members = ''] = new RegExp(`struct ${name} \\{(.*?)\\}`).exec(source) ?? []
  return 8 * members.split(/[;,]/).filter((member) => member.trim()).length
}

t.test('the constants that the host and the Hopper kernel both have are the same', async (t) => {
  const { ALONG, ACROSS, B_ACROSS, CLUSTER, STAGES, BLOCK, STAGE } = Object.fromEntries(
    ['ALONG', 'ACROSS', 'B_ACROSS', 'CLUSTER', 'STAGES', 'BLOCK', 'STAGE'].map((name) => [
      name,
      constant(GEMM_SOURCE, name),
    ]),
  ) as Record<string, number>
  t.same({ along: ALONG, across: ACROSS, b_across: B_ACROSS }, GEMM_MODES)
  t.same([CLUSTER, 128 * CLUSTER!], [GEMM_CLUSTER, GEMM_TILE.rows])
  t.equal(BLOCK, GEMM_TILE.depth * 64 * 2, 'a block is 64 x 64 of float16')
  t.equal(STAGE, (128 + GEMM_TILE.cols) * GEMM_TILE.depth * 2, 'a stage has one slice of A and one of B')
  const mirror = STAGES! * STAGE!
  const barriers = mirror + 4 * BLOCK!
  t.match(GEMM_SOURCE, `base + ${mirror} + group * 2 * BLOCK`)
  t.match(GEMM_SOURCE, `barriers = base + ${barriers};`)
  t.equal(GEMM_SHARED_BYTES, barriers + 2 * STAGES! * 8 + 1024, 'with both barriers of each stage, and the alignment')
  t.match(GEMM_SOURCE, `__launch_bounds__(${GEMM_THREADS}, 1) __cluster_dims__(${GEMM_CLUSTER}, 1, 1)\n${GEMM_KERNEL}(`)
})

t.test('the constants that the host and the elementwise kernels both have are the same', async (t) => {
  t.equal(structBytes(CUDA_SOURCE, 'Partial'), PARTIAL_BYTES)
  t.equal(structBytes(CUDA_SOURCE, 'Result'), RESULT_BYTES)
  const warps = `${THREADS} / 32`
  t.match(CUDA_SOURCE, `warps[${warps}]`)
  t.match(CUDA_SOURCE, `i < ${warps}; i++`)
  const count = THREADS / 32
  for (const use of [
    `x * ${count} + threadIdx`,
    `part.count * ${count})`,
    `[${count}][32]`,
    `row += ${count})`,
    `i < ${count};`,
  ])
    t.match(CUDA_SOURCE, use)
  t.match(CUDA_SOURCE, `Item items[(${LIST_BYTES} - sizeof(u64)) / sizeof(Item)];`)
  for (const parameters of [1, 9, 18]) {
    const item = 8 * (parameters + 2)
    const bytes = 8 + item * mostItems(parameters)
    t.ok(bytes <= LIST_BYTES && bytes + item > LIST_BYTES, 'a list has as many items as there is room for')
  }
  t.match(CUDA_SOURCE, `return x > ${SECOND_MOMENTUM_FLOOR}f ? x : ${SECOND_MOMENTUM_FLOOR}f;`)
})
