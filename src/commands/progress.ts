import { amount } from './amount.js'

/** Where progress is written: standard error, which keeps it out of a command's output. */
export type Terminal = { isTTY?: boolean; columns?: number; write(text: string): unknown }

const LARGE_BYTES = 64 << 20
const EVERY_MS = 100

/**
 * Shows on one line of a terminal how many of `total` bytes are done. Shows nothing where `total` is below 64 MiB, and
 * where the output is a file or a pipe.
 */
export function byteProgress(
  what: string,
  total: number,
  terminal: Terminal,
): { done(bytes: number): void; end(): void } {
  if (!terminal.isTTY || total < LARGE_BYTES) return { done: () => {}, end: () => {} }
  let bytes = 0
  let shownAt = 0
  const show = () => {
    const share = Math.floor((100 * bytes) / total)
    const line = `${what} ${amount(bytes, 'B')} of ${amount(total, 'B')}, ${share} %`
    // A line that the terminal wraps cannot be rewritten.
    terminal.write(`\r${line.slice(0, terminal.columns)}\x1b[K`)
  }
  return {
    done: (count) => {
      bytes += count
      if (performance.now() - shownAt < EVERY_MS) return
      shownAt = performance.now()
      show()
    },
    end: () => {
      show()
      terminal.write('\n')
    },
  }
}
