import { Tensor } from 'onnxruntime-node'
import t from 'tap'
import { DTYPES, type Dtype } from '../../kernels/dtype.js'
import { type KernelSpec, kernelIo, kernelKey } from '../../kernels/kernel.js'
import { buildKernel } from '../../kernels/model.js'
import { float32, openSession, values } from './session.js'

const DTYPE_NAMES = Object.keys(DTYPES) as Dtype[]
const FLOAT32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const MUON: KernelSpec = { kind: 'muon', coefficients: [[3.4445, -4.775, 2.0315]], tall: false, ...FLOAT32 }
const KINDS: KernelSpec[] = [
  MUON,
  { ...MUON, tall: true },
  { ...MUON, momentum_dtype: 'bfloat16' },
  { ...MUON, second_momentum: 'col' },
  { ...MUON, second_momentum: 'row' },
  { kind: 'adamw', ...FLOAT32 },
  { kind: 'adamw', amsgrad: true, ...FLOAT32 },
  { kind: 'rmsprop', ...FLOAT32 },
  { kind: 'sgd', ...FLOAT32 },
]

const SPECS = KINDS.flatMap((spec) =>
  DTYPE_NAMES.flatMap((gradient_dtype) =>
    DTYPE_NAMES.map((update_dtype): KernelSpec => ({ ...spec, gradient_dtype, update_dtype })),
  ),
)

for (const spec of SPECS) {
  t.test(`${kernelKey(spec)} loads, with the inputs and outputs of kernelIo in order`, async (t) => {
    if (Object.values(spec).includes('bfloat16')) {
      // ONNX Runtime has loaded the model by then; it is its public API that cannot name the type of an input or output.
      await t.rejects(openSession(buildKernel(spec)), { message: 'Unsupported data type: 16' })
      return
    }
    const session = await openSession(buildKernel(spec))
    const { state, scalars, checks } = kernelIo(spec)
    t.same(session.inputNames, ['gradient', ...state.map(({ name }) => name), ...scalars])
    t.same(session.outputNames, [...state.map(({ name }) => `${name}_next`), 'data', ...checks])
  })
}

t.test('every distinct kernel has its own key', async (t) => {
  const other: KernelSpec = {
    ...MUON,
    coefficients: [
      [3.4445, -4.775, 2.0315],
      [2, -1.5, 0.5],
    ],
  }
  const keys = [...SPECS, other].map(kernelKey)
  t.equal(new Set(keys).size, keys.length)
  t.equal(kernelKey(structuredClone(other)), kernelKey(other))
})

t.test('a model is smaller than 8 KiB', async (t) => {
  const coefficients = Array.from({ length: 10 }, () => [2, -1.5, 0.5] as const)
  t.ok(buildKernel({ ...MUON, coefficients }).length < 8192)
})

const SGD_SCALARS = { gradient_scale: 1, c_m: 0, c_g: 1, n_m: 1, n_g: 0 }

async function sgdUpdate(update_dtype: Dtype, value: number) {
  const session = await openSession(buildKernel({ kind: 'sgd', gradient_dtype: 'float16', update_dtype }))
  // 0x3c00 is 1 in float16; gradient_scale makes any number of it.
  const feeds: Record<string, Tensor> = {
    gradient: new Tensor('float16', Uint16Array.of(0x3c00), [1]),
    momentum_buffer: float32([0], [1]),
  }
  for (const [name, scalar] of Object.entries({ ...SGD_SCALARS, gradient_scale: value }))
    feeds[name] = float32([scalar], [1])
  return session.run(feeds)
}

t.test('an sgd update that its float16 cannot hold makes magnitude infinite', async (t) => {
  for (const [value, dtype, finite] of [
    [65504, 'float16', true],
    [65520, 'float16', false],
    [65520, 'float32', true],
  ] as const) {
    const { magnitude } = await sgdUpdate(dtype, value)
    t.equal(Number.isFinite(values(magnitude)[0]), finite, `${value} as ${dtype}`)
  }
})

t.test('a float16 gradient is widened and the update rounded', async (t) => {
  const { data, momentum_buffer_next } = await sgdUpdate('float16', 1 + 2 ** -11)
  t.equal(values(momentum_buffer_next)[0], 1 + 2 ** -11)
  t.equal(data.type, 'float16')
  t.same([...data.data], [0x3c00])
})
