import { amount, decimal, duration } from '../../amount.js'
import type { Column } from './columns.js'
import type { RunRow } from './survey.js'

const NONE = '–'

export const NAME: Column<RunRow> = { head: 'run', align: 'left', cell: ({ name }) => name }
export const STATUS: Column<RunRow> = { head: 'status', align: 'left', rank: 3, cell: ({ status }) => status }
export const STEP: Column<RunRow> = { head: 'step', align: 'right', cell: ({ step }) => String(step) }
export const STEP_RATE: Column<RunRow> = {
  head: 'steps/s',
  align: 'right',
  cell: ({ step_rate }) => (step_rate === 0 ? NONE : decimal(step_rate)),
}
export const STATE: Column<RunRow> = {
  head: 'state',
  align: 'right',
  rank: 2,
  cell: ({ state_bytes }) => amount(state_bytes, 'B'),
}
/** Members that have a connection, of all that there may be; of a run with one connection that one. */
export const MEMBERS: Column<RunRow> = {
  head: 'members',
  align: 'right',
  rank: 1,
  cell: ({ connected, connected_members = Number(connected), all_members = 1 }) =>
    `${connected_members}/${all_members}`,
}
export const LAST_STEP: Column<RunRow> = {
  head: 'last step',
  align: 'right',
  rank: 4,
  cell: ({ last_step_seconds: age }) => {
    if (age === undefined) return NONE
    return age < 2 ? 'now' : `${duration(age)} ago`
  },
}
export const DURABLE: Column<RunRow> = {
  head: 'durable',
  align: 'right',
  rank: 1,
  cell: ({ durable_step }) => String(durable_step),
}

/** A number of a receipt; a dash where there is none. */
export function figure(value: number | undefined): string {
  if (value === undefined) return NONE
  const size = Math.abs(value)
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : decimal(value)
}
