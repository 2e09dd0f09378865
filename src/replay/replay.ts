import type { Device } from '../device/device.js'
import { checkDigest } from '../keep/restore.js'
import { StoredGradients } from '../keep/stored-gradients.js'
import { settingsOf } from '../run/record.js'
import type { StepSettings } from '../run/step/step.js'
import type { StoredStep } from '../store/journal/journal-reader.js'
import { type Alternative, groupsAt } from './alternative.js'
import { Course } from './course.js'
import { type Difference, differenceOf } from './difference.js'
import { Measurer } from './measurer.js'
import type { Recording } from './recording.js'
import { type Row, type RowStep, rowsOf, sumUp } from './rows.js'

/** A step as it was computed again: its digest, and what it came to for each row, none where nothing was applied. */
export type ReplayedStep = {
  readonly step: number
  readonly digest: string
  readonly rows: readonly (RowStep | undefined)[]
}

/**
 * What came of computing a run again. With a `difference` it ended at the step that is not what the journal says, which
 * is not among `steps`.
 */
export type Replay = {
  readonly rows: readonly Row[]
  readonly steps: readonly ReplayedStep[]
  readonly difference: Difference | undefined
}

export type ReplayOptions = {
  alternative: Alternative | undefined
  /** Told of the bytes of gradients that were computed with. */
  progress: (bytes: number) => void
}

/**
 * Computes the steps of a recording again, one after the other, with the values that they had, and holds every update
 * and digest against the journal; with an alternative also what its groups make of the same gradients. Throws
 * UnreadableError for files that cannot be read, and OVER_CAPACITY.
 */
export async function replay(
  device: Device,
  recording: Recording,
  { alternative, progress }: ReplayOptions,
): Promise<Replay> {
  checkDigest(recording.manifest, recording.declaration)
  const own = await ownCourse(device, recording)
  const courses: Course[] = [own]
  const gradients = new StoredGradients(own.staging, recording.files)
  try {
    const other = alternative && (await otherCourse(device, recording, alternative))
    if (other) courses.push(other)
    const measurer = new Measurer(
      gradients,
      own,
      other && alternative && { course: other, indices: alternative.indices },
    )
    const rows = rowsOf(recording.declaration, alternative)
    const largest = largestRates(recording)
    const steps: ReplayedStep[] = []
    for await (const stored of recording.steps()) {
      const { contributors = [] } = stored.end.receipt
      const settings = settingsOf(stored.end.settings)
      const others = alternative && otherSettings(settings, alternative, largest)
      own.begin(settings, contributors)
      if (others) other?.begin(others, contributors)
      const measures = await measurer.measure(stored)
      const digest = own.end()
      other?.end()
      const difference = differenceOf(stored, own, digest)
      if (difference) return { rows, steps, difference }
      steps.push({
        step: stored.step,
        digest,
        rows: rows.map((row) => sumUp(row, measures, settings.groups, others?.groups)),
      })
      progress(bytesOf(stored))
    }
    return { rows, steps, difference: undefined }
  } finally {
    await gradients.close()
    for (const course of courses) course.dispose()
  }
}

function ownCourse(device: Device, recording: Recording): Promise<Course> {
  const { run, manifest, declaration } = recording
  return Course.start(device, {
    ...{ name: `run '${run}'`, declaration, checkpoint: recording, records: manifest.places },
    means: hasMeans(recording),
  })
}

function otherCourse(device: Device, recording: Recording, alternative: Alternative): Promise<Course> {
  const { run, manifest } = recording
  const { declaration, indices, keeps } = alternative
  const records = indices.map((index, i) => (keeps[i] ? manifest.places[index] : undefined))
  const name = `run '${run}' in other groups`
  return Course.start(device, { name, declaration, checkpoint: recording, records, means: hasMeans(recording) })
}

function hasMeans({ scanned }: Recording): boolean {
  return scanned.some(({ isMean }) => isMean)
}

function otherSettings(
  { frame, groups, gradient_scale }: StepSettings,
  alternative: Alternative,
  largest: ReadonlyMap<string, number>,
): StepSettings {
  // There is no attention for max_logits to belong to.
  return {
    groups: groupsAt(alternative, groups, largest),
    frame: { groups: {}, gradient_scale: frame.gradient_scale, max_logits: new Map() },
    gradient_scale,
  }
}

/** The largest learning rate that each group of the run has in the steps of a recording. */
function largestRates({ scanned }: Recording): Map<string, number> {
  const largest = new Map<string, number>()
  for (const { lr } of scanned)
    for (const [name, value] of lr) largest.set(name, Math.max(value, largest.get(name) ?? 0))
  return largest
}

function bytesOf({ gradients }: StoredStep): number {
  return gradients.reduce((sum, { bytes }) => sum + bytes, 0)
}
