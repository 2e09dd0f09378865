import type { Device } from '../device/device.js'
import { differenceOf } from '../keep/restore.js'
import type { DeviceRecord } from '../store/checkpoint/manifest.js'
import { tableLines } from '../text-table.js'
import type { Alternative } from './alternative.js'
import type { Difference } from './difference.js'
import type { Recording } from './recording.js'
import { type Replay, type ReplayedStep, type ReplayOptions, replay } from './replay.js'
import type { Row, RowStep } from './rows.js'
import { type Spike, spikesOf, WINDOW_STEPS } from './spikes.js'

/** Everything that is said of a replay. */
export type Report = {
  readonly recording: Recording
  readonly replay: Replay
  readonly spikes: readonly Spike[]
  readonly alternative: Alternative | undefined
  /** What has computed it. */
  readonly device: DeviceRecord
}

/** Computes a recording again, with an alternative beside it; `progress` is told of the bytes that are done. */
export async function reportOf(
  recording: Recording,
  { device, alternative, progress }: ReplayOptions & { device: Device },
): Promise<Report> {
  const replayed = await replay(device, recording, { alternative, progress })
  const spikes = spikesOf(replayed.rows, replayed.steps)
  return { recording, replay: replayed, spikes, alternative, device: device.record }
}

/** Most steps of a table, unless it is asked for others. */
const TABLE_STEPS = 20

/** The report in words. `every`: a table has the steps whose number it divides, the first, the last and all spikes. */
export function textOf(report: Report, every: number | undefined, width?: number): string {
  const { replay, spikes } = report
  const shown = shownSteps(replay.steps, spikes, every)
  const tables = replay.rows.map((row, i) => sectionOf(row, i, shown, width))
  const sections = [...tables, spikeLines(report), notesOf(report).map((note) => `note: ${note}`)]
  return [headOf(report), ...sections]
    .filter((lines) => lines.length > 0)
    .map((lines) => lines.join('\n'))
    .join('\n\n')
}

/** The report as plain data. */
export function jsonOf(report: Report): object {
  const { recording, replay, spikes, device } = report
  const { rows, steps, difference } = replay
  return {
    ...{ run: recording.run, checkpoint: recording.entry.checkpoint, from_step: recording.entry.step },
    ...{ to_step: recording.to, last_step: recording.last, device },
    ...{ equal: difference === undefined, steps_equal: steps.length, difference },
    rows: rows.map(({ parameters, ...row }) => ({ ...row, parameters: parameters.map(({ name }) => name) })),
    steps: steps.map(({ step, digest, rows: values }) => ({
      ...{ step, digest },
      rows: Object.fromEntries(values.flatMap((value, i) => (value ? [[rows[i].name, value]] : []))),
    })),
    spikes,
    notes: notesOf(report),
  }
}

/** What a step that is not the journal's differs in: the step, the parameter, and both digests. */
export function differenceLines({ step, record, digest, parameter }: Difference): string[] {
  const what = parameter
    ? `parameter '${parameter.name}': ${parameter.what} is ${parameter.computed}, the journal has ${parameter.journal} (${parameter.record})`
    : 'every update is the one that the journal has: its digest, or one before it, is another'
  const both = `digest ${digest.computed}, the journal has ${digest.journal} (${record})`
  return [`step ${step} is not what the journal says`, what, both]
}

function headOf({ recording, replay, device }: Report): string[] {
  const { run, entry, to, last } = recording
  const { steps, difference } = replay
  const title = `run '${run}': steps ${entry.step + 1} to ${to} of ${last}, from ${entry.checkpoint}, on ${device.name} with ONNX Runtime ${device.onnxruntime}`
  if (difference) return [title, `${counted(steps.length)} as the journal says, then:`, ...differenceLines(difference)]
  const digest = steps.at(-1)?.digest
  return [title, `${counted(steps.length)} computed again: every digest is the journal's, the last one is ${digest}`]
}

function counted(steps: number): string {
  return `${steps} step${steps === 1 ? '' : 's'}`
}

function shownSteps(
  steps: readonly ReplayedStep[],
  spikes: readonly Spike[],
  every = Math.ceil(steps.length / TABLE_STEPS),
): readonly ReplayedStep[] {
  const always = new Set([steps[0]?.step, steps.at(-1)?.step, ...spikes.map(({ step }) => step)])
  return steps.filter(({ step }) => step % every === 0 || always.has(step))
}

const HEAD = ['step', 'lr', 'gradient norm', 'update norm', 'update RMS']
const OTHER_HEAD = ['other lr', 'other norm', 'other RMS', 'ratio', 'cosine']

/** A row's title and the table of its steps. */
function sectionOf(row: Row, at: number, steps: readonly ReplayedStep[], width?: number): string[] {
  const { name, algorithm, alternative, parameters } = row
  const other = alternative ? `, in group ${alternative.group}: ${alternative.algorithm}` : ''
  const title = `${name}: ${algorithm}, ${parameters.length} parameter${parameters.length === 1 ? '' : 's'}${other}`
  const head = alternative ? [...HEAD, ...OTHER_HEAD] : HEAD
  const rows = steps.map(({ step, rows: values }) => {
    const value = values[at]
    return [String(step), ...(value ? cellsOf(value, alternative !== undefined) : head.slice(1).map(() => '-'))]
  })
  return [title, ...tableLines({ head, align: head.map(() => 'right'), rows }, width)]
}

function cellsOf(value: RowStep, hasOther: boolean): string[] {
  const { lr, gradient_norm, update_norm, update_rms, alternative } = value
  const own = [lr, gradient_norm, update_norm, update_rms].map(significant)
  if (!hasOther) return own
  const other = [alternative?.lr, alternative?.update_norm, alternative?.update_rms, alternative?.ratio]
  return [...own, ...other.map(significant), alternative?.cosine?.toFixed(4) ?? '-']
}

function significant(value: number | undefined): string {
  return value === undefined ? '-' : String(Number(value.toPrecision(4)))
}

function spikeLines({ spikes, replay }: Report): string[] {
  if (spikes.length === 0 && replay.steps.length > 0) return ['no gradient norm left its band']
  return spikes.map(({ row, step, last_step, gradient_norm, peak, median, bound, parameter }) => {
    const until = last_step === step ? '' : ` (to step ${last_step}, at most ${significant(peak)})`
    const norm = `the gradient norm of ${row} is ${significant(gradient_norm)}${until}`
    const band = `its median over up to ${WINDOW_STEPS} steps before is ${significant(median)}, its band ends at ${significant(bound)}`
    return `step ${step}: ${norm}; ${band}; parameter '${parameter}' has the largest gradient`
  })
}

/** What a reader has to know to take the numbers for what they are. */
function notesOf(report: Report): string[] {
  const { recording, alternative, device } = report
  const moved = differenceOf(recording.manifest.device, device)
  const isMean = recording.scanned.some((step) => step.isMean)
  return [
    'an update is scale · data: without weight decay and the row scales of QK-clip, which need the weights',
    ...(alternative ? alternativeNotes(report) : []),
    ...(isMean
      ? [
          'gradients are means of replicas: the journal has the means, and of what each replica sent only the fingerprint',
        ]
      : []),
    ...(moved ? [`of ${recording.entry.checkpoint}: ${moved}`] : []),
  ]
}

function alternativeNotes({ recording, alternative, replay }: Report): string[] {
  const cold = replay.rows.flatMap(({ name, alternative: other }) =>
    other && other.begins !== 'state' ? [`${name} begins with ${other.begins}`] : [],
  )
  const steady = replay.rows.filter((row) => {
    const other = row.alternative
    return other !== undefined && !alternative?.follows.has(other.group) && hasSchedule(row, recording)
  })
  return [
    'the gradients are those of the run as it was: with other updates the weights, and so the gradients, would have been others. This says what the other groups make of these gradients, not where they would have led',
    ...(cold.length > 0 ? [`behind step ${recording.entry.step}: ${cold.join(', ')}`] : []),
    ...steady.map(({ name }) => `the run changes lr of ${name}, the other group does not: lr_schedule run follows it`),
  ]
}

function hasSchedule({ group }: Row, { scanned }: Recording): boolean {
  return new Set(scanned.map(({ lr }) => lr.get(group))).size > 1
}
