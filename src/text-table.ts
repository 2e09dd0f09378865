export type Align = 'left' | 'right'

/** A table: `head`, `align` and each row have one entry for each column. */
export type Table = {
  readonly head: readonly string[]
  readonly align: readonly Align[]
  readonly rows: readonly (readonly string[])[]
}

const GAP = '  '
const SHORTEST = 12

/** The lines of a table. Where they are longer than `width`, the first column is shortened, to 12 at the least. */
export function tableLines({ head, align, rows }: Table, width = Number.POSITIVE_INFINITY): string[] {
  const all = [head, ...rows]
  const widths = head.map((_, column) => Math.max(...all.map((row) => row[column].length)))
  const excess = widths.reduce((sum, wide) => sum + wide, GAP.length * (head.length - 1)) - width
  widths[0] = Math.max(Math.min(widths[0], SHORTEST), widths[0] - Math.max(0, excess))
  return all.map((row) => line(row, widths, align))
}

function line(row: readonly string[], widths: readonly number[], align: readonly Align[]): string {
  const cells = row.map((text, column) => {
    const cell = column === 0 ? shorten(text, widths[0]) : text
    return align[column] === 'left' ? cell.padEnd(widths[column]) : cell.padStart(widths[column])
  })
  return cells.join(GAP).trimEnd()
}

/** Cuts a text down to `width` characters in its middle: both ends of a name tell more, and the last one the most. */
export function shorten(text: string, width: number): string {
  if (text.length <= width) return text
  const start = Math.floor((width - 1) / 3)
  return `${text.slice(0, start)}…${text.slice(text.length - (width - 1 - start))}`
}

/** Folds a text between words into lines of at most `width` characters; a longer word has a line for itself. */
export function foldText(text: string, width: number): string[] {
  const [first, ...words] = text.split(' ')
  const lines = [first]
  for (const word of words) {
    const last = lines[lines.length - 1]
    if (last.length + 1 + word.length > width) lines.push(word)
    else lines[lines.length - 1] = `${last} ${word}`
  }
  return lines
}
