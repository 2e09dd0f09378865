/** How a case ended: with the same result, with it after an explicit error, or otherwise. */
export type Result = 'same' | 'error' | 'lost'

/** The cases of a fault. Each counts once in `same`, `error` or `lost`. */
export type Row = {
  fault: string
  aimed: string
  count: number
  /** How many kills are known to have fallen where they were aimed; absent for other faults. */
  fell?: number
  same: number
  error: number
  lost: number
  seconds: number
  /** Why there is no count, or how to read it. */
  note?: string
}

const HEAD = [
  'fault',
  'aimed at',
  'cases',
  'fell there',
  'same result',
  'explicit error, then the same',
  'lost',
  'seconds',
]

/** The rows as a Markdown table, in columns of equal width, and their notes below it. */
export function markdown(rows: readonly Row[]): string {
  const notes = [...new Set(rows.flatMap(({ note }) => note ?? []))]
  const cells = rows.map((row) => {
    const { fault, aimed, count, fell = '', same, error, lost, seconds, note } = row
    const mark = note === undefined ? '' : ` [${notes.indexOf(note) + 1}]`
    return [`${fault}${mark}`, aimed, count, fell, same, error, lost, seconds.toFixed(0)].map(String)
  })
  const total = (key: 'count' | 'same' | 'error' | 'lost' | 'seconds') => rows.reduce((sum, row) => sum + row[key], 0)
  const all = ['all', '', total('count'), '', total('same'), total('error'), total('lost'), total('seconds').toFixed(0)]
  const lines = [HEAD, ...cells, all.map(String)]
  const widths = HEAD.map((_, column) => Math.max(...lines.map((line) => line[column].length)))
  const line = (row: readonly string[]) =>
    `| ${row.map((cell, i) => (i < 2 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join(' | ')} |`
  const rule = `|${widths.map((width, i) => (i < 2 ? '-'.repeat(width + 2) : `${'-'.repeat(width + 1)}:`)).join('|')}|`
  const footnotes = notes.map((note, i) => `[${i + 1}] ${note}`)
  return [line(HEAD), rule, ...lines.slice(1).map(line), ...(notes.length > 0 ? ['', ...footnotes] : [])].join('\n')
}
