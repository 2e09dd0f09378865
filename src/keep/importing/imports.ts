import type { Device } from '../../device/device.js'
import { ServiceError } from '../../errors.js'
import type { ImportedState } from '../../run/imported-state.js'
import type { Run } from '../../run/run.js'
import type { Archive } from '../archive.js'
import { pendingImport } from './receive-state.js'

/** After which step a run goes on from imported state, with which digest, and the checkpoint that has it. */
export type Imported = { step: number; digest: string; checkpoint?: string }

/** The imports that are under way, at most one into each run. */
export class Imports {
  readonly #device: Device
  readonly #archive: Archive | undefined
  readonly #underWay = new Map<Run, Promise<unknown>>()

  /** `archive` is undefined where nothing is kept on a disk. */
  constructor(device: Device, archive: Archive | undefined) {
    this.#device = device
    this.#archive = archive
  }

  /** Whether one into this run is under way. */
  has(run: Run): boolean {
    return this.#underWay.has(run)
  }

  /** When those have ended that are under way. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#underWay.values())
  }

  /** Does the `work` of an import into a run. Throws RUN_BUSY where another one is under way. */
  async import<T>(run: Run, work: () => Promise<T>): Promise<T> {
    if (this.has(run)) throw new ServiceError('RUN_BUSY', `state is being imported into run '${run.name}' already`)
    const importing = work()
    this.#underWay.set(run, importing)
    try {
      return await importing
    } finally {
      this.#underWay.delete(run)
    }
  }

  /** Has a run go on from state that was received for it. Throws STEP_INCOMPLETE, and STORAGE_FAILED. */
  takeOver(run: Run, state: ImportedState): Promise<Imported> {
    return run.boundary.between('state is imported between two steps', async () => {
      const pending = await pendingImport(this.#device, run, state)
      const { step } = run
      const { digest } = pending
      if (this.#archive) {
        const { checkpoint } = await this.#archive.keeper(run.name).import(pending)
        return { step, digest, checkpoint }
      }
      run.takeOver(pending)
      return { step, digest }
    })
  }
}
