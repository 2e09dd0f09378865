import { Readable } from 'node:stream'
import { bytesPerElement } from '../../kernels/dtype.js'
import type { Device } from '../device/device.js'
import type { Runs } from '../keep/runs.js'
import type { Run } from '../run/run.js'
import { encodeHeader, SAFETENSORS_NAMES, type TensorEntry } from '../store/safetensors.js'
import { betweenSteps } from './checkpoints.js'
import type { BodyMeter } from './metered.js'
import type { components } from './openapi.js'
import type { StateReaders } from './readers.js'

type StateTensor = components['schemas']['StateTensor']
/** A run whose state is read, and the meter of whoever reads it. */
type Reading = { readers: StateReaders; run: Run; meter: BodyMeter }
type Held = ReturnType<Run['stateTensors']>

/**
 * The state tensors of a parameter with their norms; none before its first step. Reads them turn by turn of the event
 * loop.
 */
export async function stateNorms(
  device: Device,
  { readers, run }: { readers: StateReaders; run: Run },
  index: number,
): Promise<StateTensor[]> {
  const leave = readers.enter(run)
  const held = run.stateTensors(index)
  try {
    const described: StateTensor[] = []
    for (const { name, dtype, shape, tensor } of held) {
      const norm = Math.sqrt(await squareSum(readers.inTurns(device.read([tensor]), tensor.bytes), READERS[dtype]))
      const elements = tensor.bytes / bytesPerElement(dtype)
      described.push({ name, dtype, shape: [...shape], norm, rms: norm / Math.sqrt(elements) })
    }
    return described
  } finally {
    release(device, held)
    leave()
  }
}

/**
 * A safetensors body with the state of one parameter, and its length in bytes.
 * State tensors are immutable, so the references taken here make it the state of one moment however slowly it is read.
 */
export function stateBody(
  device: Device,
  { readers, run, meter }: Reading,
  index: number,
): { length: number; body: Readable } {
  const { held, release } = holdParameter(device, { readers, run }, index)
  const { parameter, algorithm, count: step } = run.place(index)
  const metadata = {
    run: run.name,
    parameter: parameter.name,
    algorithm,
    run_step: String(run.step),
    ...momentumForm(run, parameter.group),
  }
  const entries = entriesOf(held)
  const header = encodeHeader(entries, metadata)
  const length = entries.reduce((sum, { bytes }) => sum + bytes, header.length)
  const read = readers.inTurns(pieces(device, header, { held, step }), length)
  const body = Readable.from(meter.pass(read), { objectMode: false })
  // Not in the generator: a reader that leaves before the first piece never starts it.
  body.once('close', release)
  return { length, body }
}

/** A safetensors body with the whole state of a run after its last finished step, and its length in bytes. */
export async function runStateBody(
  runs: Runs,
  { readers, run, meter }: Reading,
): Promise<{ length: number; body: Readable }> {
  const { file, release } = await betweenSteps(runs, run, async () => readers.file(run))
  try {
    const { bytes, pieces } = await file.body()
    const body = Readable.from(meter.pass(readers.inTurns(pieces(), bytes)), { objectMode: false })
    body.once('close', release)
    return { length: bytes, body }
    /* c8 ignore start -- the header of a run that was opened can be written */
  } catch (error) {
    release()
    throw error
  }
  /* c8 ignore stop */
}

/** A parameter's state tensors and the memory that they may take when the run has gone on. */
function holdParameter(
  device: Device,
  { readers, run }: { readers: StateReaders; run: Run },
  index: number,
): { held: Held; release: () => void } {
  const leave = readers.enter(run)
  const held = run.stateTensors(index)
  try {
    const grant = readers.keep(
      run,
      held.map(({ tensor }) => tensor),
    )
    const giveBack = () => {
      release(device, held)
      device.dismiss(grant)
      leave()
    }
    return { held, release: giveBack }
  } catch (error) {
    release(device, held)
    leave()
    throw error
  }
}

/** The numbers in the bytes of each dtype. A bfloat16 is the upper half of a float32. */
const READERS = {
  float32: (piece: Uint8Array<ArrayBuffer>) => new Float32Array(piece.buffer),
  bfloat16: (piece: Uint8Array<ArrayBuffer>) =>
    new Float32Array(Uint32Array.from(new Uint16Array(piece.buffer), (half) => half << 16).buffer),
} as const

const STEP_BYTES = BigInt64Array.BYTES_PER_ELEMENT

/** The pieces of a body, one copy at a time. `step` comes first, which aligns every tensor to its element size. */
function* pieces(
  device: Device,
  header: Uint8Array,
  { held, step }: { held: Held; step: number },
): Generator<Uint8Array> {
  yield header
  if (held.length > 0) yield new Uint8Array(BigInt64Array.of(BigInt(step)).buffer)
  yield* device.read(held.map(({ tensor }) => tensor))
}

function entriesOf(held: Held): TensorEntry[] {
  if (held.length === 0) return []
  const tensors = held.map(({ name, dtype, shape, tensor }) => ({
    name,
    dtype: SAFETENSORS_NAMES[dtype],
    shape,
    bytes: tensor.bytes,
  }))
  return [{ name: 'step', dtype: 'I64', shape: [], bytes: STEP_BYTES }, ...tensors]
}

function momentumForm(run: Run, group: string): Record<string, string> {
  const form = run.opened(true).groups[group]?.momentum_form
  return typeof form === 'string' ? { momentum_form: form } : {}
}

async function squareSum(
  pieces: AsyncIterable<Uint8Array<ArrayBuffer>>,
  read: (piece: Uint8Array<ArrayBuffer>) => Float32Array,
): Promise<number> {
  let sum = 0
  for await (const piece of pieces) for (const value of read(piece)) sum += value * value
  return sum
}

function release(device: Device, held: Held): void {
  for (const { tensor } of held) device.memory.release(tensor)
}
