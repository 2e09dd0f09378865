import type { Device } from '../device/device.js'
import { describe } from '../optimizer/parameter.js'
import type { Run } from '../run/run.js'
import type { HeldTensor } from '../run/shard.js'
import type { RunRecord } from '../store/checkpoint/manifest.js'
import { stateMetadata, stateName } from '../store/checkpoint/state-source.js'
import { encodeHeader, SAFETENSORS_NAMES, type TensorEntry } from '../store/safetensors.js'

/**
 * A run's whole state as one safetensors file: its length, the tensors that it keeps, and its bytes for one reader,
 * of which one piece's copy is held at a time.
 */
export type StateFile = {
  bytes: number
  tensors: readonly HeldTensor[]
  pieces: () => Iterable<Uint8Array>
  release: () => void
}

const STEP_BYTES = BigInt64Array.BYTES_PER_ELEMENT

/**
 * The state after the last finished step. State tensors are immutable, so the references taken here make it the state
 * of one moment however slowly it is read; `release` gives them back. Throws STEP_INCOMPLETE where a step has begun.
 */
export function stateFile(device: Device, run: Run): StateFile {
  run.checkBetween('its state is read between two steps')
  const { record, tensors } = run.snapshot()
  const entries = entriesOf(record, tensors)
  const header = encodeHeader(entries, stateMetadata(record))
  let held = tensors
  const release = () => {
    for (const { tensor } of held) device.memory.release(tensor)
    held = []
  }
  const bytes = entries.reduce((sum, entry) => sum + entry.bytes, header.length)
  return { bytes, tensors, pieces: () => pieces(device, header, { record, tensors }), release }
}

/** Every count first, which keeps all behind them aligned. One of 0 says that the parameter has no other state yet. */
function entriesOf({ parameters }: RunRecord, tensors: readonly HeldTensor[]): TensorEntry[] {
  return [
    ...parameters.map(({ name }): TensorEntry => {
      return { name: stateName(name, 'step'), dtype: 'I64', shape: [], bytes: STEP_BYTES }
    }),
    ...tensors.map(({ parameter, name, dtype, shape, tensor: { bytes } }): TensorEntry => {
      return { name: stateName(parameter.name, name), dtype: SAFETENSORS_NAMES[dtype], shape, bytes }
    }),
  ]
}

function* pieces(
  device: Device,
  header: Uint8Array,
  { record, tensors }: ReturnType<Run['snapshot']>,
): Generator<Uint8Array> {
  yield header
  yield new Uint8Array(BigInt64Array.from(record.places, ({ count }) => BigInt(count)).buffer)
  yield* device.read(tensors.map(({ tensor }) => tensor))
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
