import { type Align, tableLines } from '../../../text-table.js'

/**
 * A column of a table whose lines have to fit a terminal. Where they do not, the columns with the lowest `rank` are
 * left out; one without a rank never is.
 */
export type Column<Row> = {
  readonly head: string
  readonly align: Align
  readonly rank?: number
  readonly cell: (row: Row) => string
}

const GAP_COLUMNS = 2
/** The first column is a name, which stays so long where it is longer. */
const NAME_COLUMNS = 20

/** The lines of a table with as many of the columns as `width` has room for, the first of which is a name. */
export function fittedLines<Row>(
  rows: readonly Row[],
  columns: readonly Column<Row>[],
  width = Number.POSITIVE_INFINITY,
): string[] {
  let kept = columns.map((column) => ({ ...column, cells: rows.map(column.cell) }))
  while (widthOf(kept) > width) {
    const last = kept.toSorted((one, other) => (one.rank ?? Infinity) - (other.rank ?? Infinity))[0]
    if (last.rank === undefined) break
    kept = kept.filter((column) => column !== last)
  }
  return tableLines(
    {
      head: kept.map(({ head }) => head),
      align: kept.map(({ align }) => align),
      rows: rows.map((_, i) => kept.map(({ cells }) => cells[i])),
    },
    width,
  )
}

function widthOf(columns: readonly { head: string; cells: readonly string[] }[]): number {
  const widths = columns.map(({ head, cells }) => Math.max(head.length, ...cells.map(({ length }) => length)))
  const [name, ...rest] = widths
  return rest.reduce((sum, wide) => sum + GAP_COLUMNS + wide, Math.min(name, NAME_COLUMNS))
}
