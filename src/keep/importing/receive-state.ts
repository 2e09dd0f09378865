import assert from 'node:assert'
import { createHash, type Hash } from 'node:crypto'
import { setImmediate as turn } from 'node:timers/promises'
import type { Device } from '../../device/device.js'
import { stateBytes } from '../../optimizer/parameter.js'
import { importDigest } from '../../run/digest.js'
import { type ImportedPlace, ImportedState, type PendingImport } from '../../run/imported-state.js'
import type { Run } from '../../run/run.js'
import { bytesOf, Elements, firstRefused } from '../../store/elements.js'
import { SAFETENSORS_DTYPES } from '../../store/safetensors.js'
import { readStream, type TensorSink } from '../../store/safetensors-stream.js'
import { headerLimit } from '../state-file.js'
import { type ImportOptions, type ImportPlan, invalid, planImport, type Target } from './import-plan.js'

/** A body that is too long for the state that it is for; both counts are in bytes. */
export class BodyTooLargeError extends Error {
  override readonly name = 'BodyTooLargeError'
}

/** Averages of squares: with a number below zero every later update would be NaN. */
const SQUARES: ReadonlySet<string> = new Set(['exp_avg_sq', 'max_exp_avg_sq', 'square_avg', 'second_momentum'])
const FLOAT32_BYTES = 4
const COUNT_BYTES = 8

/**
 * Receives state for a run as a safetensors file, into memory of its own: the run does not change. `bytes` is the
 * file's length, where its sender has said. Throws ServiceError where the state does not fit the run,
 * SafetensorsError where the file is none and BodyTooLargeError where it cannot be one for this run.
 */
export async function receiveState(
  device: Device,
  run: Run,
  { body, bytes, ...options }: ImportOptions & { body: AsyncIterable<Uint8Array>; bytes?: number },
): Promise<ImportedState> {
  const headerBytes = headerLimit(run)
  checkBytes(run, bytes, headerBytes)
  let incoming: ImportedState | undefined
  try {
    await readStream(body, {
      headerBytes,
      bytes,
      opened: (header) => {
        const plan = planImport(run, header, options)
        incoming = reserve(device, run, plan)
        allocate(device, run, { incoming, plan })
        const { places } = incoming
        return ({ name }) => sinkOf(device, places, { name, target: plan.targets.get(name) })
      },
    })
    assert(incoming, 'a body that was read had a header')
    return incoming
  } catch (error) {
    incoming?.dispose()
    throw error
  }
}

function checkBytes(run: Run, bytes: number | undefined, headerBytes: number): void {
  // A tensor that is kept in 16 bits may come in 32.
  const elements = run.parameters.flatMap(({ state }) => state.map(({ shape }) => shape.reduce((a, b) => a * b, 1)))
  const counts = COUNT_BYTES * run.parameters.length
  const most = elements.reduce((sum, count) => sum + count * FLOAT32_BYTES, headerBytes + counts)
  if (bytes === undefined || bytes <= most) return
  throw new BodyTooLargeError(
    `the body has ${bytes} bytes, one with the state of run '${run.name}' has at most ${most}`,
  )
}

/** The grant for all that is to come. Throws OVER_CAPACITY. */
function reserve(device: Device, run: Run, { given }: ImportPlan): ImportedState {
  const { units, bytes } = run.grant
  const needed = bytes.map(() => 0)
  for (const index of given) needed[units[index]] += stateBytes(run.parameter(index))
  const grant = device.reserve(needed, `the state imported into run '${run.name}'`)
  return new ImportedState(device, { grant, parameters: run.parameters.length })
}

function allocate(device: Device, run: Run, { incoming, plan }: { incoming: ImportedState; plan: ImportPlan }): void {
  const { units } = run.grant
  const { places } = incoming
  const { given, targets } = plan
  for (const { parameter } of targets.values()) places[parameter.index] ??= { count: 0, hashes: [], tensors: [] }
  for (const index of given) {
    for (const { bytes } of run.parameter(index).state)
      places[index]?.tensors.push(device.memory.allocate(bytes, units[index]))
  }
}

function sinkOf(
  device: Device,
  places: readonly (ImportedPlace | undefined)[],
  { name, target }: { name: string; target: Target | undefined },
): TensorSink {
  const place = target && places[target.parameter.index]
  assert(place, 'every tensor of the header was planned')
  return 'count' in target
    ? countSink(place, { name, dtype: target.count })
    : tensorSink(device, place, { ...target, name })
}

/** Converts, checks and hashes a tensor's elements on their way to memory. */
function tensorSink(
  device: Device,
  place: ImportedPlace,
  { name, position, kept, conversion }: Extract<Target, { position: number }> & { name: string },
): TensorSink {
  const tensor = place.tensors[position]
  const elements = new Elements(conversion)
  const hash = createHash('sha256')
  const mayBeNegative = !SQUARES.has(kept.name)
  let offset = 0
  return (piece) => {
    const values = elements.take(piece)
    const refused = firstRefused(values, { mayBeNegative })
    if (refused) {
      const at = offset / values.BYTES_PER_ELEMENT + refused.index
      const expected = mayBeNegative ? 'a finite number' : 'a finite number >= 0'
      throw invalid(`tensor '${name}' has ${refused.value} as element ${at}, expected ${expected}`)
    }
    const bytes = bytesOf(values)
    device.write(tensor, offset, bytes)
    hash.update(bytes)
    offset += bytes.length
    if (offset === tensor.bytes) place.hashes[position] = hash.digest('hex')
  }
}

/**
 * A count is torch's `step`: an integer, which torch itself keeps as a float32. It is 0 exactly where there is no
 * other state.
 */
function countSink(place: ImportedPlace, { name, dtype }: { name: string; dtype: 'I64' | 'F32' }): TensorSink {
  const bytes = Buffer.alloc(SAFETENSORS_DTYPES[dtype])
  let filled = 0
  return (piece) => {
    bytes.set(piece, filled)
    filled += piece.length
    if (filled < bytes.length) return
    const count = dtype === 'I64' ? Number(bytes.readBigInt64LE()) : bytes.readFloatLE()
    const least = place.tensors.length > 0 ? 1 : 0
    const expected = least === 1 ? 'an integer from 1 on' : '0, as there is no other state of its parameter'
    if (!Number.isSafeInteger(count) || count < least || (least === 0 && count > 0))
      throw invalid(`tensor '${name}' is ${count}, expected ${expected}`)
    place.count = count
  }
}

/**
 * The import of `state`, and the digest that the run will have with it. State that stays is read again, turn by turn
 * of the event loop: nothing may move it meanwhile.
 */
export async function pendingImport(device: Device, run: Run, state: ImportedState): Promise<PendingImport> {
  const places: { hashes: readonly string[]; count: number }[] = []
  for (const [index, place] of state.places.entries()) {
    places.push(place ?? { hashes: await hashesOf(device, run, index), count: run.place(index).count })
  }
  const step_digest = run.stepDigest
  const imported = { step_digest, hashes: places.map(({ hashes }) => hashes) }
  return { state, digest: importDigest(step_digest, places), imported }
}

async function hashesOf(device: Device, run: Run, index: number): Promise<string[]> {
  const held = run.stateTensors(index)
  try {
    const hashes: Hash[] = held.map(() => createHash('sha256'))
    for (const [i, { tensor }] of held.entries()) {
      for (const piece of device.read([tensor])) {
        hashes[i].update(piece)
        await turn()
      }
    }
    return hashes.map((hash) => hash.digest('hex'))
  } finally {
    for (const { tensor } of held) device.memory.release(tensor)
  }
}
