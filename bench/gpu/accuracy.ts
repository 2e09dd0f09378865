import { readFileSync, writeFileSync } from 'node:fs'
import { CUDA_OPTIONS, CUDA_SOURCE } from '../../kernels/cuda/source.js'
import { compileCuda, openCuda } from '../../src/device/cuda.js'
import { CudaExecutor } from '../../src/device/cuda-executor.js'
import { viewMemory } from '../../src/device/onnxruntime.js'
import { planStep } from '../../src/optimizer/algorithm.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'

/** Reads cases.json of a folder and each case's gradient, writes its update: accuracy.py makes the one and judges the other. */
const dir = process.argv[2]
type Case = { name: string; shape: number[]; dtype: string; group: Record<string, unknown>; layout?: object }
const cases: Case[] = JSON.parse(readFileSync(`${dir}/cases.json`, 'utf8'))
const cuda = openCuda(0)
const cubin = compileCuda(CUDA_SOURCE, CUDA_OPTIONS(cuda.computeCapability))
const executor = new CudaExecutor({ kind: 'cuda', folder: process.env.MUOND_ONNXRUNTIME_DIR ?? '', gpu: 0, cubin })
for (const { name, shape, dtype, group, layout } of cases) {
  const groups = new Map([['g', parseGroup({ name: 'g', ...group } as never)]])
  const raw = [{ name, shape, group: 'g', gradient_dtype: dtype, update_dtype: 'float32', ...layout }]
  const [parameter] = parseParameters(raw, groups)
  const bytes = readFileSync(`${dir}/${name}.gradient`)
  const block = (size: number) => ({ pointer: cuda.allocateHost(size), bytes: size })
  const [gradient, update] = [block(bytes.length), block(parameter.update_bytes)]
  viewMemory(gradient.pointer, bytes.length).set(bytes)
  const whole = (memory: { pointer: bigint; bytes: number }) => ({ block: memory, offset: 0, bytes: memory.bytes })
  const make = () => parameter.state.map((tensor) => cuda.allocate(tensor.bytes))
  const base = { gradient: whole(gradient), update: whole(update), gradient_scale: 1 }
  const group1 = groups.get('g') as never
  const first = make()
  const one = executor.run({
    ...base,
    plan: planStep(parameter, group1, { step: 1, replay: false }),
    state: undefined,
    next: first,
  })
  const second = make()
  const two = executor.run({
    ...base,
    plan: planStep(parameter, group1, { step: 2, replay: false }),
    state: first,
    next: second,
  })
  writeFileSync(`${dir}/${name}.update`, viewMemory(update.pointer, update.bytes))
  const state = new Uint8Array(parameter.state[0].bytes)
  cuda.read(state, second[0])
  writeFileSync(`${dir}/${name}.state`, state)
  const third = make()
  const replayed = executor.run({
    ...base,
    plan: planStep(parameter, group1, { step: 2, replay: true }),
    state: second,
    next: third,
  })
  console.log(
    name,
    one.outcome,
    two.outcome,
    'replay equal',
    replayed.updateFingerprint === two.updateFingerprint,
    Math.sqrt(two.gradientSquare),
    two.gradientFingerprint.toString(16),
  )
}
executor.close()
