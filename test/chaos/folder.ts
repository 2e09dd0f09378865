import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { branchFolder } from '../../src/store/branches.js'
import { branchesOnDisk } from '../../src/store/checkpoint/checkpoint-list.js'
import { listSegments } from '../../src/store/journal/journal.js'
import { readJournal } from '../../src/store/journal/journal-reader.js'

/** The unfinished files that an interrupted service left in a run's folder: they tell where the kill fell. */
export type Remains = {
  /** A checkpoint's folder without its manifest. */
  checkpointUnfinished: boolean
  /** A manifest that was not renamed yet. */
  manifestUnnamed: boolean
  /** A journal with bytes behind its last finished step. */
  journalTail: boolean
  /** The journal ends with a gradient or an end that is cut off. */
  recordTorn: boolean
}

export const runFolder = (data: string, run: string) => join(data, 'runs', run)

export const checkpointId = (step: number) => `step-${String(step).padStart(12, '0')}`

/** Looks at a run's folder while no service has it. */
export async function inspect(folder: string): Promise<Remains> {
  const branches = (await branchesOnDisk(folder)).map((branch) => branchFolder(folder, branch))
  const contents = branches.map((branch) => join(branch, 'checkpoints')).flatMap(contentsOf)
  const unfinished = contents.filter((names) => !names.includes('manifest.json'))
  // The newest branch is the one that the run is on.
  const journal = join(branches.at(-1) ?? folder, 'journal')
  const tail = existsSync(journal) && (await listSegments(journal)).length > 0 ? await tailOf(journal) : undefined
  return {
    checkpointUnfinished: unfinished.some((names) => !names.includes('manifest.json.new')),
    manifestUnnamed: unfinished.some((names) => names.includes('manifest.json.new')),
    journalTail: tail !== undefined,
    recordTorn: tail?.damaged !== undefined,
  }
}

function contentsOf(checkpoints: string): string[][] {
  return existsSync(checkpoints) ? readdirSync(checkpoints).map((name) => readdirSync(join(checkpoints, name))) : []
}

async function tailOf(journal: string) {
  // The first step in the journal: a checkpoint has the steps before it.
  const [{ first }] = await listSegments(journal)
  return (await readJournal(journal, first - 1)).tail
}
