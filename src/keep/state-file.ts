import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import { describe } from '../optimizer/parameter.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { HeldTensor, Snapshot } from '../run/snapshot.js'
import type { RunRecord } from '../store/checkpoint/manifest.js'
import { stateMetadata, stateName } from '../store/checkpoint/state-source.js'
import { encodingHeader, SAFETENSORS_NAMES, type TensorEntry } from '../store/safetensors.js'

/** A safetensors file: its length, and its bytes for one reader, of which one piece's copy is held at a time. */
export type FileBody = { bytes: number; pieces: () => Iterable<Uint8Array> }

/**
 * A run's whole state as one safetensors file: the tensors that it keeps, and its body, whose header is written once,
 * in slices.
 */
export type StateFile = {
  tensors: readonly Tensor[]
  body: () => Promise<FileBody>
  release: () => void
}

const STEP_BYTES = BigInt64Array.BYTES_PER_ELEMENT

/**
 * The state after the last finished step. State tensors are immutable, so the references taken here make it the state
 * of one moment however slowly it is read; `release` gives them back. Throws STEP_INCOMPLETE where a step has begun.
 */
export function stateFile(device: Device, run: Run): StateFile {
  run.checkBetween('its state is read between two steps')
  const snapshot = run.snapshot()
  const { tensors } = snapshot
  const write = async () => {
    const { header, counts } = await inSlices(encoding(snapshot))
    const bytes = tensors.reduce((sum, tensor) => sum + tensor.bytes, header.length + counts.length)
    return { bytes, pieces: () => pieces(device, [header, counts], tensors) }
  }
  let written: Promise<FileBody> | undefined
  const body = () => {
    written ??= write()
    return written
  }
  return { tensors, body, release: () => snapshot.release() }
}

function* encoding(snapshot: Snapshot): Generator<undefined, { header: Uint8Array; counts: Uint8Array }> {
  const { record, tensors } = yield* snapshot.describing()
  const metadata = stateMetadata(record)
  yield
  const header = yield* encodingHeader(entriesOf(record, tensors), metadata)
  return { header, counts: countsOf(record) }
}

/** Every count first, which keeps all behind them aligned. One of 0 says that the parameter has no other state yet. */
function* entriesOf({ parameters }: RunRecord, tensors: readonly HeldTensor[]): Generator<TensorEntry> {
  for (const { name } of parameters) yield { name: stateName(name, 'step'), dtype: 'I64', shape: [], bytes: STEP_BYTES }
  for (const { parameter, name, dtype, shape, tensor } of tensors) {
    yield { name: stateName(parameter.name, name), dtype: SAFETENSORS_NAMES[dtype], shape, bytes: tensor.bytes }
  }
}

function* pieces(
  device: Device,
  [header, counts]: [header: Uint8Array, counts: Uint8Array],
  tensors: readonly Tensor[],
): Generator<Uint8Array> {
  yield header
  yield counts
  yield* device.read(tensors)
}

// For 100,000 counts BigInt64Array.from takes 21 ms, and this 3.
function countsOf({ places }: RunRecord): Uint8Array {
  const counts = new BigInt64Array(places.length)
  for (let i = 0; i < counts.length; i++) counts[i] = BigInt(places[i].count)
  return new Uint8Array(counts.buffer)
}

const SLACK_BYTES = 65_536
const ENTRY_BYTES = 512
/**
 * A character that JSON escapes takes six bytes, and another writer may escape every one; twice, within the metadata.
 */
const ESCAPED = 12

/** Most bytes that the header of a file with a run's state may have, whoever wrote it. */
export function headerLimit(run: Run): number {
  const groups = JSON.stringify(run.opened(true).groups).length
  const bytes = run.parameters.map((parameter) => {
    const words = JSON.stringify(describe(parameter)).length
    return (parameter.state.length + 3) * (ENTRY_BYTES + ESCAPED * words)
  })
  return bytes.reduce((sum, each) => sum + each, SLACK_BYTES + ESCAPED * groups)
}
