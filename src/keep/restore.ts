import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import { errorText, ServiceError } from '../errors.js'
import { type Attention, parseAttentions } from '../optimizer/attention.js'
import { type Parameter, parseParameters } from '../optimizer/parameter.js'
import { claimsByParameter, rowScale } from '../optimizer/qk-clip.js'
import type { Declaration } from '../run/declaration.js'
import { FIRST_DIGEST, importDigest, nextDigest } from '../run/digest.js'
import { Member } from '../run/members/member.js'
import { answered } from '../run/place.js'
import { appliedOf, groupsOf, settingsOf } from '../run/record.js'
import type { Run } from '../run/run.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import {
  type DeviceRecord,
  type Manifest,
  type RunRecord,
  type SettingsRecord,
  UnreadableError,
} from '../store/checkpoint/manifest.js'
import { stateName } from '../store/checkpoint/state-source.js'
import type { StoredGradient, StoredStep } from '../store/journal/journal-reader.js'
import type { RunStore } from '../store/run-store.js'
import { SAFETENSORS_NAMES } from '../store/safetensors.js'
import { StoredGradients } from './stored-gradients.js'

/** What a checkpoint's run was declared with. */
export function keptDeclaration(record: RunRecord): Declaration {
  const groups = groupsOf(record.groups)
  const parameters = parseParameters(record.parameters, groups)
  return { groups, parameters, attentions: parseAttentions(record.attentions, parameters) }
}

/** A checkpoint and its manifest, which was read. */
export type CheckpointOnDisk = { store: RunStore; entry: CheckpointEntry; manifest: Manifest }

type Declared = { parameters: readonly Parameter[]; attentions: readonly Attention[] }

/**
 * Holds a checkpoint's digest against what its last step was applied with, or what was imported after that. Throws
 * UnreadableError with both.
 */
export function checkDigest(record: RunRecord, declared: Declared): void {
  const { run, step, digest, last, places, imported } = record
  const of = (what: string, actual: string, expected: string) => {
    if (actual !== expected)
      throw new UnreadableError(`${what} of run '${run}' has digest ${actual}, expected ${expected}`)
  }
  const own = last ? stepDigest(record, last, declared) : FIRST_DIGEST
  of(`step ${step}`, own, imported?.step_digest ?? digest)
  if (!imported) return
  const whole = places.map(({ count }, i) => ({ count, hashes: imported.hashes[i] }))
  of(`the state imported after step ${step}`, importDigest(own, whole), digest)
}

function stepDigest(
  { step, previous_digest, places }: RunRecord,
  last: SettingsRecord,
  { parameters, attentions }: Declared,
): string {
  const { max_logits } = settingsOf(last).frame
  const claims = claimsByParameter(attentions)
  const records = parameters.map((parameter, i) => {
    const { applied_step, last: applied } = places[i]
    return {
      applied: applied && applied_step === step ? appliedOf(applied) : undefined,
      row_scale: rowScale(parameter, claims, max_logits),
    }
  })
  return nextDigest(previous_digest, step, records)
}

/** Whether what one device computed has other bits on another, and why, in words for a person. */
export function differenceOf(wrote: DeviceRecord, now: DeviceRecord): string | undefined {
  const key = (['kind', 'onnxruntime', 'processor', 'name'] as const).find((name) => wrote[name] !== now[name])
  return (
    key &&
    `its last steps were computed on ${describe(wrote)}, here is ${describe(now)}: results may differ in their last bits`
  )
}

function describe({ kind, name, onnxruntime, processor }: DeviceRecord): string {
  return `${kind === 'cpu' ? `cpu ${processor}`.trim() : name} with ONNX Runtime ${onnxruntime}`
}

/**
 * The state tensors of a checkpoint, in memory of the device; undefined for a parameter that has none yet. Every file
 * of the checkpoint is held against its hash. Throws UnreadableError.
 */
export async function readTensors(
  device: Device,
  { store, entry, manifest }: CheckpointOnDisk,
  { parameters, units }: { parameters: readonly Parameter[]; units: readonly number[] },
): Promise<(Tensor[] | undefined)[]> {
  const { places } = manifest
  const tensors: (Tensor[] | undefined)[] = parameters.map(() => undefined)
  try {
    for (const [i, { state }] of parameters.entries()) {
      if (places[i].count > 0) tensors[i] = state.map(({ bytes }) => device.memory.allocate(bytes, units[i]))
    }
    const targets = parameters.flatMap(({ name, state }, i) =>
      (tensors[i] ?? []).map((tensor, at) => {
        const { dtype, shape, name: kind } = state[at]
        return [stateName(name, kind), { ...tensor, dtype: SAFETENSORS_NAMES[dtype], shape }] as const
      }),
    )
    await store.read(entry, manifest, { targets: new Map(targets), locations: device.locations })
    return tensors
  } catch (error) {
    for (const tensor of tensors.flat()) if (tensor) device.memory.release(tensor)
    throw error
  }
}

/**
 * Computes a journal's steps again, each from the gradients that it was computed from, and holds every update and
 * digest against what was acknowledged; `elsewhere` only the gradients. Throws UnreadableError that names the record.
 */
export async function replay(
  run: Run,
  { steps, elsewhere }: { steps: readonly StoredStep[]; elsewhere: boolean },
): Promise<void> {
  const gradients = new StoredGradients(run.staging)
  const member = new Member()
  try {
    for (const stored of steps) {
      run.repeat(settingsOf(stored.end.settings), stored.end.receipt.contributors ?? [])
      const done = await Promise.allSettled(
        stored.gradients.map((gradient) => applyAgain(run, { member, gradient, gradients, elsewhere })),
      )
      const failed = done.find((result) => result.status === 'rejected')
      if (failed) throw failed.reason
      await named(stored.label, () => run.endAgain(member, stored.end))
    }
  } finally {
    await gradients.close()
  }
}

type Again = { member: Member; gradient: StoredGradient; gradients: StoredGradients; elsewhere: boolean }

async function applyAgain(run: Run, { member, gradient: stored, gradients, elsewhere }: Again): Promise<void> {
  const { parameter: index, step: number, applied, label } = stored
  await named(label, async () => {
    const { contributors } = appliedOf(applied)
    const gradient = await gradients.read(stored, run.parameter(index))
    try {
      const step = run.intake.expect(member, index, number)
      const part = { member, step, index, gradient, contributors }
      const update = await answered((answer) => run.intake.compute(part, answer))
      update?.memory.release()
      run.acknowledge(index, applied, elsewhere)
    } finally {
      gradient.release()
    }
  })
}

/** What goes wrong with a record is told with its name, but for a lack of memory, which is nothing of its own. */
async function named(label: string, work: () => Promise<void>): Promise<void> {
  try {
    await work()
  } catch (error) {
    /* c8 ignore next -- needs a device that runs out of memory in the middle of this */
    if (error instanceof ServiceError && error.code === 'OVER_CAPACITY') throw error
    throw new UnreadableError(`${label}: ${errorText(error)}`)
  }
}
