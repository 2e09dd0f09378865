/** Where progress is written: standard error, which keeps it out of a program's results. */
export type ProgressStream = { isTTY?: boolean; columns?: number; write(text: string): unknown }

const CELLS = 30

/**
 * A progress bar of `total` steps. On a terminal it rewrites one line; elsewhere (a log, a pipe) it writes a line
 * each time another tenth is done. Returns the function to call with the number of steps done and a note.
 */
export function progressBar(label: string, total: number, stream: ProgressStream = process.stderr) {
  let tenths = 0
  return (done: number, note: string) => {
    const line = `${label} ${bar(done / total)} ${String(done).padStart(String(total).length)}/${total}  ${note}`
    if (stream.isTTY) {
      // A line that the terminal wraps cannot be rewritten.
      stream.write(`\r${line.slice(0, stream.columns)}\x1b[K${done >= total ? '\n' : ''}`)
    } else if (Math.floor((done * 10) / total) > tenths) {
      tenths = Math.floor((done * 10) / total)
      stream.write(`${line}\n`)
    }
  }
}

function bar(fraction: number): string {
  const filled = Math.round(CELLS * fraction)
  return `[${'#'.repeat(filled)}${'.'.repeat(CELLS - filled)}]`
}
