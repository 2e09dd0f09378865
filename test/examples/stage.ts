import { fileURLToPath } from 'node:url'
import type { Stage } from '../../examples/stage.js'

const TEXT = Buffer.from(
  'The optimizer is a service, and the service is the optimizer: it keeps what the steps share. '.repeat(20),
)

/** A stage with the real service and a text that no commit changes; `notes` collects the notes of progress. */
export function stageWithNotes(): { stage: Stage; notes: string[] } {
  const notes: string[] = []
  const bar = (label: string, total: number) => (done: number, note: string) =>
    void notes.push(`${label.trim()} ${done}/${total} ${note}`)
  const server = fileURLToPath(new URL('../../src/server.js', import.meta.url))
  return { stage: { server, corpus: { train: TEXT, validation: TEXT, files: 1 }, bar }, notes }
}

/** The cells of a Markdown table, without the line below its header. */
export function cellsOf(table: string): string[][] {
  const rows = table.split('\n').map((line) =>
    line
      .slice(1, -1)
      .split('|')
      .map((cell) => cell.trim()),
  )
  return [rows[0]!, ...rows.slice(2)]
}
