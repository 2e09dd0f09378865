import { bytesPerElement } from '../../../kernels/dtype.js'
import type { Receipt } from '../../run/history.js'
import type { Run } from '../../run/run.js'
import { encodeHeader, type TensorEntry } from '../../store/safetensors.js'
import { tensorDtype } from './dtypes.js'
import type { FinishedStep } from './plain-step.js'

/** A safetensors file, its pieces to be read once: each is a copy. */
export type UpdateFile = { bytes: number; pieces: Iterable<Uint8Array> }

/** A tensor of the file, and where its bytes lie. */
type Entry = TensorEntry & { view: () => Uint8Array }

const PIECE_BYTES = 2 ** 18

/** The updates of a step as a safetensors file, with the factors and the receipt as its metadata. */
export function updateFile(run: Run, step: FinishedStep): UpdateFile {
  const entries = [...updatesOf(run, step), ...rowScalesOf(run, step)]
  // Tensors of longer elements first, so that each is aligned.
  entries.sort((one, other) => Number(other.dtype === 'F32') - Number(one.dtype === 'F32'))
  const metadata = { updates: JSON.stringify(factorsOf(run, step)), receipt: JSON.stringify(receiptOf(step.receipt)) }
  const header = encodeHeader(entries, metadata)
  const bytes = entries.reduce((sum, entry) => sum + entry.bytes, header.length)
  return { bytes, pieces: piecesOf(header, entries) }
}

function updatesOf(run: Run, { updates }: FinishedStep): Entry[] {
  return updates.map(({ index, update: { memory } }) => {
    const parameter = run.parameter(index)
    const { name, shape, update_dtype, update_bytes: bytes } = parameter
    const dtype = tensorDtype(parameter, update_dtype)
    return { name: `update.${name}`, dtype, shape, bytes, view: () => memory.chunk(0, bytes) }
  })
}

function rowScalesOf(run: Run, { updates, skipped }: FinishedStep): Entry[] {
  const all = [...updates.map(({ index, update: { row_scale } }) => ({ index, row_scale })), ...skipped]
  return all.flatMap(({ index, row_scale }) => {
    if (!row_scale) return []
    const shape = [row_scale.length / bytesPerElement('float32')]
    const name = `row_scale.${run.parameter(index).name}`
    return [{ name, dtype: 'F32', shape, bytes: row_scale.length, view: () => row_scale }]
  })
}

/** By the name of the parameter: what an `update` frame says beside its tensors. */
function factorsOf(run: Run, { updates, skipped, receipt: { replayed } }: FinishedStep): object {
  const sent = updates.map(({ index, update: { scale, decay, replayed, gradient_norm, update_rms } }) => {
    return [run.parameter(index).name, { scale, decay, replayed, gradient_norm, update_rms }] as const
  })
  const clipped = skipped.map(({ index }) => [run.parameter(index).name, { scale: 0, decay: 0, replayed }] as const)
  return Object.fromEntries([...sent, ...clipped])
}

function receiptOf({ type: _, ...receipt }: Receipt): object {
  return receipt
}

function* piecesOf(header: Uint8Array, entries: readonly Entry[]): Generator<Uint8Array> {
  yield header
  for (const { bytes, view } of entries) {
    for (let offset = 0; offset < bytes; offset += PIECE_BYTES) yield view().slice(offset, offset + PIECE_BYTES)
  }
}
