import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import ort from 'onnxruntime-node'
import t from 'tap'
import { buildKernel } from '../../../kernels/model.js'
import { checkVersion, type OnnxRuntime, openOnnxRuntime, viewMemory } from '../../../src/device/onnx/onnxruntime.js'
import { gaussian } from '../../reference.js'

const normal = (n: number, seed: number) => Float32Array.from(gaussian(seed, n))

const SPEC = { kind: 'adamw', gradient_dtype: 'float32', update_dtype: 'float32' } as const
const SCALARS = {
  gradient_scale: 1,
  a_m: 0.9,
  a_g: 0.1,
  b_v: 0.999,
  b_g: 0.001,
  bias1: 0.1,
  bias2_sqrt: 0.03,
  eps: 1e-8,
}
const OUTPUTS = ['exp_avg_next', 'exp_avg_sq_next', 'data', 'magnitude']

function nativeTensor(runtime: OnnxRuntime, values: ArrayLike<number>, dims: readonly number[] = [values.length]) {
  const bytes = values.length * 4
  const pointer = runtime.allocate(bytes)
  const view = new Float32Array(viewMemory(pointer, bytes).buffer)
  view.set(values)
  return { view, pointer, tensor: runtime.createTensor({ pointer, bytes }, dims, 1) }
}

t.test('a model gives the same bits through the C API as through the public API of onnxruntime-node', async (t) => {
  const n = 1000
  const inputs: Record<string, Float32Array> = {
    gradient: normal(n, 1),
    exp_avg: normal(n, 2),
    exp_avg_sq: normal(n, 3).map(Math.abs),
  }
  for (const [name, value] of Object.entries(SCALARS)) inputs[name] = Float32Array.of(value)
  const model = buildKernel(SPEC)
  const session = await ort.InferenceSession.create(model, { intraOpNumThreads: 1 })
  const feeds = Object.fromEntries(
    Object.entries(inputs).map(([name, data]) => [name, new ort.Tensor('float32', data, [data.length])]),
  )
  const expected = await session.run(feeds)

  const runtime = openOnnxRuntime()
  const names = { inputs: Object.keys(inputs), outputs: OUTPUTS }
  const ours = runtime.createSession(model, names, { threads: 1 })
  const given = Object.values(inputs).map((values) => nativeTensor(runtime, values))
  const results = OUTPUTS.map((name) =>
    nativeTensor(runtime, new Float32Array(expected[name]!.size), expected[name]!.dims),
  )
  runtime.run(
    ours,
    given.map((input) => input.tensor),
    results.map((output) => output.tensor),
  )
  OUTPUTS.forEach((name, i) => {
    t.same(results[i]!.view, expected[name]!.data, name)
  })
  for (const { tensor, pointer } of [...given, ...results]) {
    runtime.releaseTensor(tensor)
    runtime.free(pointer)
  }
  runtime.releaseSession(ours)
  runtime.close()
})

t.test('the library says what it is, and its errors carry its words', async (t) => {
  const runtime = openOnnxRuntime()
  t.match(runtime.version, /^1\.\d+\.\d+$/)
  t.ok(runtime.providers().includes('CPUExecutionProvider'))
  t.throws(
    () => runtime.createSession(new Uint8Array([1, 2, 3]), { inputs: [], outputs: [] }, { threads: 1 }),
    /CreateSessionFromArray: .*protobuf/i,
  )
})

t.test('a folder without the library is refused by name', async (t) => {
  const empty = mkdtempSync(join(tmpdir(), 'muond-'))
  t.throws(() => openOnnxRuntime(empty), { message: `there is no libonnxruntime in ${empty}` })
})

t.test('a library that is too old or of another major version is refused with both versions', async (t) => {
  for (const version of ['1.28.9', '0.30.0', '2.0.0'])
    t.throws(() => checkVersion(version, '/lib'), {
      message: `ONNX Runtime in /lib is ${version}, needed is 1.29 or later`,
    })
  for (const version of ['1.29.0', '1.100.0']) checkVersion(version, '/lib')
})
