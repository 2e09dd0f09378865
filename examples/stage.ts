import type { Plot } from './plot.js'
import type { progressBar } from './progress.js'
import { type Service, startService } from './service.js'
import type { Corpus } from './text.js'

/** What an example needs of the outside: the program of the service, text to learn from, and somebody to tell of its progress. */
export type Stage = { server: string; corpus: Corpus; bar: typeof progressBar }

/** A claim and how it is measured: `table` (Markdown) and `plots` follow from the results alone, which are kept as JSON. */
export type Example<Settings, Results> = {
  /** `quick` is too small to show anything, but shows how it runs, in seconds. */
  sizes: Readonly<Record<'full' | 'quick', Settings>>
  measure: (stage: Stage, settings: Settings) => Promise<Results>
  table: (results: Results) => string
  plots: (results: Results) => readonly Plot[]
}

/** One progress bar for `total` steps of any number of runs; to be called once for each step, with a note. */
export function ticks({ bar }: Stage, label: string, total: number): (note: string) => void {
  const report = bar(label.padEnd(10), total)
  let done = 0
  return (note) => report(++done, note)
}

/** Does `work` with a service of its own, which is stopped whatever happens. */
export async function withService<T>(
  { server }: Stage,
  work: (service: Service) => Promise<T>,
  args: readonly string[] = [],
): Promise<T> {
  const service = await startService(server, { args: ['--device', 'cpu', ...args] })
  try {
    return await work(service)
  } finally {
    await service.stop()
  }
}
