import { figure } from '../src/plot/plot.js'
import { efficiency } from './efficiency.js'
import { overhead } from './overhead.js'
import { qkClip } from './qk-clip.js'
import type { Example, Stage } from './stage.js'
import { updateRms } from './update-rms.js'

/** An example without the types of its settings and results. */
export type Entry = {
  /** Runs the example; the results are plain data, as JSON holds it. */
  measure: (stage: Stage, size: 'full' | 'quick') => Promise<unknown>
  /** The table (Markdown) and the picture (SVG) of what `measure` returned, fresh or read back from JSON. */
  show: (results: unknown) => { table: string; svg: string }
}

/** The examples by name, in the order in which they run: the shortest first. */
export const EXAMPLES: ReadonlyMap<string, Entry> = new Map([
  ['update-rms', entry(updateRms)],
  ['overhead', entry(overhead)],
  ['qk-clip', entry(qkClip)],
  ['efficiency', entry(efficiency)],
])

function entry<Settings, Results>(example: Example<Settings, Results>): Entry {
  return {
    measure: (stage, size) => example.measure(stage, example.sizes[size]),
    show: (results) => {
      const known = results as Results
      return { table: example.table(known), svg: figure(example.plots(known)) }
    },
  }
}
