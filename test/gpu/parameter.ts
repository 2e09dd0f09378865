/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { bytesPerElement, type Dtype } from '../../kernels/dtype.js'
import type { Device } from '../../src/device/device.js'
import type { Job } from '../../src/device/job.js'
import type { Tensor } from '../../src/device/memory.js'
import { planStep } from '../../src/optimizer/algorithms/algorithm.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { type Parameter, parseParameters, stateBytes } from '../../src/optimizer/parameter.js'
import type { ParameterDeclaration } from '../../src/wire/frame.js'

/** One parameter of one group on a unit of a device, step by step. */
export function startParameter(
  device: Device,
  algorithm: Record<string, unknown>,
  declared: Partial<ParameterDeclaration>,
  unit = 0,
) {
  const groups = new Map([['g', parseGroup({ name: 'g', ...algorithm } as Parameters<typeof parseGroup>[0])]])
  const raw = { name: 'p', shape: [1], group: 'g', update_dtype: 'float32', ...declared } as ParameterDeclaration
  const [parameter] = parseParameters([raw], groups)
  const group = groups.get('g')!
  const { gradient_bytes, update_bytes } = parameter!
  const plan = planStep(parameter!, group, { step: 1, replay: false })
  const demand = { plan, gradient_bytes, update_bytes, state_bytes: stateBytes(parameter!) }
  const grant = device.admit([demand], 'the test')
  const loaded = device.load([demand])
  let state: Tensor[] | undefined
  const compute = async (gradient: Uint8Array, at: { step: number; replay?: boolean }) => {
    await loaded
    const region = device.staging.tryReserve(parameter!.gradient_bytes)!
    region.view.set(gradient)
    const next = parameter!.state.map(({ bytes }) => device.memory.allocate(bytes, unit))
    const update = device.takeUpdate(parameter!.update_bytes)
    const job: Job = {
      plan: planStep(parameter!, group, { step: at.step, replay: at.replay ?? false }),
      gradient: region,
      gradient_scale: 1,
      state: state?.map(({ pointer }) => pointer),
      next: next.map(({ pointer }) => pointer),
      update,
    }
    const result = (await device.run(() => job, { cancelled: false }, unit))!
    const data = update.view.slice()
    region.release()
    update.release()
    for (const tensor of (at.replay ? next : state) ?? []) device.memory.release(tensor)
    if (!at.replay) state = next
    return { result, data }
  }
  const end = () => {
    for (const tensor of state ?? []) device.memory.release(tensor)
    device.dismiss(grant)
  }
  const read = (index: number) =>
    floatsOf(Buffer.concat([...device.read([state![index]!])]), parameter!.state[index]!.dtype)
  return { parameter: parameter as Parameter, compute, read, end }
}

/** Little-endian elements, rounded to the dtype (to nearest, ties away from zero). */
export function bytesOf(values: Float64Array, dtype: Dtype): Uint8Array {
  if (dtype === 'float32') return new Uint8Array(Float32Array.from(values).buffer)
  const encode = dtype === 'bfloat16' ? bfloat16 : float16
  return new Uint8Array(Uint16Array.from(values, encode).buffer)
}

export function floatsOf(bytes: Uint8Array, dtype: Dtype): Float64Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const size = bytesPerElement(dtype)
  return Float64Array.from({ length: bytes.length / size }, (_, i) => {
    if (dtype === 'float32') return view.getFloat32(i * 4, true)
    const bits = view.getUint16(i * 2, true)
    if (dtype === 'bfloat16') return new Float32Array(Uint32Array.of(bits << 16).buffer)[0]!
    const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023]
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
  })
}

function bfloat16(value: number): number {
  return (new Uint32Array(Float32Array.of(value).buffer)[0]! + 0x8000) >>> 16
}

function float16(value: number): number {
  const sign = value < 0 ? 0x8000 : 0
  const exponent = Math.max(-14, Math.floor(Math.log2(Math.abs(value))))
  const fraction = Math.round((Math.abs(value) / 2 ** exponent) * 1024)
  return fraction < 1024 ? sign | fraction : sign | (((exponent + 15) << 10) + fraction - 1024)
}
/* c8 ignore stop */
