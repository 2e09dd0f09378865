import { readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { hasCode, makeFolder, replaceFile, syncFolder } from '../../../store/durable.js'
import type { Assignment } from '../../assignment.js'
import type { Versioned } from '../coordinator.js'
import { assignmentRule, seal, unseal } from '../envelope.js'

/**
 * Assignments of one process: a file for each run in a folder that this process alone writes to, as the lock of its
 * data folder sees to; without a folder they end with the process. Writes go one after the other, so that the version
 * that a write has compared is still there when it writes.
 */
export class AssignmentFiles {
  readonly #folder: string | undefined
  readonly #memory = new Map<string, string>()
  #last: Promise<unknown> = Promise.resolve()

  constructor(folder: string | undefined) {
    this.#folder = folder
  }

  async read(run: string): Promise<Versioned<Assignment> | undefined> {
    const content = await this.#content(run)
    if (content === undefined) return undefined
    const { mark, value } = unseal(content, assignmentRule, `assignment of run '${run}'`)
    return { value, version: mark }
  }

  write(run: string, assignment: Assignment, version: string | undefined): Promise<boolean> {
    return this.#inTurn(run, version, () => this.#keep(run, seal(assignment).content))
  }

  remove(run: string, version: string): Promise<boolean> {
    return this.#inTurn(run, version, () => this.#forget(run))
  }

  #inTurn(run: string, version: string | undefined, change: () => Promise<void>): Promise<boolean> {
    const turn = this.#last.then(async () => {
      if ((await this.read(run))?.version !== version) return false
      await change()
      return true
    })
    this.#last = turn.catch(() => undefined)
    return turn
  }

  /** Throws where it cannot be told whether there is one. */
  async #content(run: string): Promise<string | undefined> {
    if (this.#folder === undefined) return this.#memory.get(run)
    try {
      return await readFile(fileOf(this.#folder, run), 'utf8')
    } catch (error) {
      if (hasCode(error, 'ENOENT')) return undefined
      throw error
    }
  }

  async #keep(run: string, content: string): Promise<void> {
    if (this.#folder === undefined) {
      this.#memory.set(run, content)
      return
    }
    await makeFolder(this.#folder)
    await replaceFile(fileOf(this.#folder, run), content)
  }

  async #forget(run: string): Promise<void> {
    if (this.#folder === undefined) {
      this.#memory.delete(run)
      return
    }
    await rm(fileOf(this.#folder, run))
    await syncFolder(this.#folder)
  }
}

function fileOf(folder: string, run: string): string {
  return join(folder, `${run}.json`)
}
