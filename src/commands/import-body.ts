import { ConfigError } from '../config.js'
import { elementsOf, type FileTensor, givenDtype, readTensor } from '../exchange/foreign/file-tensor.js'
import type { Origin } from '../exchange/foreign/foreign-file.js'
import { type Group, groupOf } from '../optimizer/hyperparameters.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { StateTensor } from '../optimizer/state.js'
import { stateName } from '../store/checkpoint/state-source.js'
import { encodeHeader, SAFETENSORS_DTYPES, type TensorEntry } from '../store/safetensors.js'
import type { Match } from './matching.js'

/** A safetensors body of `bytes` bytes; `notes` are sentences for the person: which tensors were taken as zero. */
export type Body = { bytes: number; pieces: AsyncIterable<Uint8Array>; notes: string[] }

type Part = { entry: TensorEntry; read: () => AsyncIterable<Uint8Array> | Iterable<Uint8Array> }

export type BodyOptions = {
  origin: Origin
  groups: ReadonlyMap<string, Group>
  /** The update count of a parameter whose optimizer keeps none. All counts above 0 compute the same there. */
  count: number
  metadata: Record<string, string>
}

const COUNT_BYTES = 8
const ZEROS_BYTES = 1 << 20

/** Makes the body of an import; tensors are read when it is sent. Throws ConfigError for a tensor that is missing. */
export function bodyOf(matches: readonly Match[], options: BodyOptions): Body {
  const notes: string[] = []
  const counts = matches.map(({ parameter, state: { count, tensors } }): Part => {
    const value = tensors.size > 0 ? (count ?? options.count) : 0
    if (!Number.isSafeInteger(value) || value < 0)
      throw new ConfigError(`step of parameter '${parameter.name}' is ${value} in the file`)
    const entry = { name: stateName(parameter.name, 'step'), dtype: 'I64', shape: [], bytes: COUNT_BYTES } as const
    return { entry, read: () => [new Uint8Array(BigInt64Array.of(BigInt(value)).buffer)] }
  })
  const tensors = matches.flatMap((found) => partsOf(found, options, notes))
  const parts = [...counts, ...tensors]
  const header = encodeHeader(
    parts.map(({ entry }) => entry),
    options.metadata,
  )
  const pieces = async function* () {
    yield header
    for (const { read } of parts) yield* read()
  }
  return { bytes: parts.reduce((sum, { entry }) => sum + entry.bytes, header.length), pieces: pieces(), notes }
}

function partsOf({ parameter, state }: Match, options: BodyOptions, notes: string[]): Part[] {
  const { tensors } = state
  if (tensors.size === 0) return []
  const kept = parameter.state.map(({ name }) => name)
  const unknown = [...tensors.keys()].find((name) => !kept.includes(name))
  if (unknown !== undefined) {
    const { algorithm } = groupOf(parameter, options.groups)
    throw new ConfigError(
      `the file has '${unknown}' of parameter '${parameter.name}', ${algorithm} keeps ${kept.join(', ')}`,
    )
  }
  return parameter.state.map((expected) => {
    const tensor = tensors.get(expected.name)
    if (tensor) return given(parameter, { expected, tensor, origin: options.origin })
    notes.push(`parameter '${parameter.name}' has no ${expected.name} in the file: it is zero`)
    return zeros(parameter, expected, groupOf(parameter, options.groups))
  })
}

function given(
  parameter: Parameter,
  { expected, tensor, origin }: { expected: StateTensor; tensor: FileTensor; origin: Origin },
): Part {
  const what = `'${expected.name}' of parameter '${parameter.name}'`
  const { shape } = expected
  if (!fits(tensor.shape, shape, origin))
    throw new ConfigError(`${what} has shape [${tensor.shape}] in the file, [${shape}] in the run`)
  const dtype = givenDtype(tensor, what)
  const entry = {
    name: stateName(parameter.name, expected.name),
    dtype,
    shape,
    bytes: elementsOf(tensor) * SAFETENSORS_DTYPES[dtype],
  }
  return { entry, read: () => readTensor(tensor, what) }
}

/** Whether a tensor has the run's shape. Moonlight flattens a buffer of more than two dimensions to a matrix. */
function fits(given: readonly number[], expected: readonly number[], origin: Origin): boolean {
  if (String(given) === String(expected)) return true
  const [rows, ...rest] = expected
  return (
    origin === 'moonlight' && expected.length > 2 && String(given) === String([rows, rest.reduce((a, b) => a * b, 1)])
  )
}

/** A momentum buffer of zeros: torch keeps none where momentum is 0, and no step here reads it then. */
function zeros(parameter: Parameter, expected: StateTensor, { hyperparameters }: Group): Part {
  if (expected.name !== 'momentum_buffer' || !('momentum' in hyperparameters) || hyperparameters.momentum !== 0)
    throw new ConfigError(`the file has no '${expected.name}' of parameter '${parameter.name}'`)
  const bytes = elementsOf(expected) * SAFETENSORS_DTYPES.F32
  const entry = { name: stateName(parameter.name, expected.name), dtype: 'F32', shape: expected.shape, bytes } as const
  const read = function* () {
    for (let at = 0; at < bytes; at += ZEROS_BYTES) yield new Uint8Array(Math.min(ZEROS_BYTES, bytes - at))
  }
  return { entry, read }
}
