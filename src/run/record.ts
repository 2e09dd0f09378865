import { type Group, type Groups, restoreGroup } from '../optimizer/hyperparameters.js'
import type { AppliedRecord, GroupRecord, SettingsRecord } from '../store/checkpoint/manifest.js'
import type { DigestRecord } from './digest.js'
import type { StepSettings } from './step/step.js'

// What of a run is written to a checkpoint or a journal, and read back.

export function groupRecords(groups: Groups): GroupRecord[] {
  return [...groups.values()].map(({ name, algorithm, preset, given, hyperparameters }) => {
    return { name, algorithm, ...(preset !== undefined && { preset }), given, hyperparameters }
  })
}

export function groupsOf(records: readonly GroupRecord[]): Groups {
  return new Map(records.map((record): [string, Group] => [record.name, restoreGroup(record)]))
}

export function settingsRecord({ groups, frame }: StepSettings): SettingsRecord {
  const max_logits = Object.fromEntries([...frame.max_logits].map(([name, logits]) => [name, [...logits]]))
  return { groups: groupRecords(groups), frame: { ...frame, max_logits } }
}

/** JSON has no infinity: -Infinity, the only one that max_logits may hold, comes back as null. */
export function settingsOf({ groups, frame }: SettingsRecord): StepSettings {
  const max_logits = Object.entries(frame.max_logits).map(([name, logits]) => {
    return [name, logits.map((logit) => logit ?? -Infinity)] as const
  })
  const { gradient_scale } = frame
  return { groups: groupsOf(groups), frame: { ...frame, max_logits: new Map(max_logits) }, gradient_scale }
}

export function appliedRecord(record: DigestRecord): AppliedRecord {
  const { gradient_scale, gradientFingerprint, updateFingerprint, scale, decay, contributors } = record
  const replicas = contributors?.map(({ fingerprint, ...rest }) => ({
    ...rest,
    fingerprint: fingerprintText(fingerprint),
  }))
  return {
    gradient_scale,
    gradient_fingerprint: fingerprintText(gradientFingerprint),
    update_fingerprint: fingerprintText(updateFingerprint),
    scale,
    decay,
    ...(replicas && { contributors: replicas }),
  }
}

export function appliedOf(record: AppliedRecord): DigestRecord {
  const { gradient_scale, gradient_fingerprint, update_fingerprint, scale, decay } = record
  const contributors = record.contributors?.map(({ fingerprint, ...rest }) => ({
    ...rest,
    fingerprint: numberOf(fingerprint),
  }))
  return {
    gradient_scale,
    gradientFingerprint: numberOf(gradient_fingerprint),
    updateFingerprint: numberOf(update_fingerprint),
    scale,
    decay,
    ...(contributors && { contributors }),
  }
}

function numberOf(fingerprint: string): bigint {
  return BigInt(`0x${fingerprint}`)
}

/** As docs/protocol.md writes one: 16 hexadecimal digits. */
export function fingerprintText(fingerprint: bigint): string {
  return fingerprint.toString(16).padStart(16, '0')
}
