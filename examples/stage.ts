import type { Plot } from '../src/plot/plot.js'
import type { progressBar } from './progress.js'
import { type Service, startService } from './service.js'
import type { Corpus } from './text.js'

/** The surroundings of an example: the program of the service, the text to learn from, and where progress is shown. */
export type Stage = { server: string; corpus: Corpus; bar: typeof progressBar }

/**
 * A claim and its measurement. `table` (Markdown) and `plots` follow from the results alone, which are kept as JSON.
 */
export type Example<Settings, Results> = {
  /** `quick` takes seconds: it is too small to prove the claim, and shows that the example runs. */
  sizes: Readonly<Record<'full' | 'quick', Settings>>
  measure: (stage: Stage, settings: Settings) => Promise<Results>
  table: (results: Results) => string
  plots: (results: Results) => readonly Plot[]
}

/**
 * A progress bar for `total` steps of any number of runs; the function is to be called after each step, with a note.
 */
export function ticks({ bar }: Stage, label: string, total: number): (note: string) => void {
  const report = bar(label.padEnd(10), total)
  let done = 0
  return (note) => report(++done, note)
}

/** Runs `work` with a service of its own, and stops the service whether `work` fails or not. */
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
