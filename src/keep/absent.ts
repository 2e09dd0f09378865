import { errorText, ServiceError } from '../errors.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import { StoreError } from '../store/objects/objects.js'
import type { IdleRun } from './idle.js'

/** The runs that are on the disk and not in memory. */
export class AbsentRuns {
  /** Those that wait to be restored, with an empty text, and those that cannot be, with the reason. */
  readonly stored: Map<string, string>
  /** Those that have left memory because nobody uses them, or found no room there. */
  readonly idle = new Map<string, IdleRun>()

  constructor(names: readonly string[]) {
    this.stored = new Map(names.map((name) => [name, '']))
  }

  has(name: string): boolean {
    return this.stored.has(name) || this.idle.has(name)
  }

  /** Why a run cannot be had as it is; undefined where there is none of this name. */
  notInMemory(name: string): ServiceError | undefined {
    if (this.idle.has(name)) {
      const remedy = 'an open brings it back, and so does reading its state'
      return new ServiceError('RESTORING', `run '${name}' is idle and on the disk: ${remedy}`)
    }
    const problem = this.stored.get(name)
    if (problem === '') return new ServiceError('RESTORING', `run '${name}' waits to be restored`)
    return problem === undefined ? undefined : new ServiceError('CHECKPOINT_UNREADABLE', problem)
  }

  /** A run waits to be restored. */
  wait(name: string): void {
    this.leave(name)
    this.stored.set(name, '')
  }

  /** A run is idle. */
  rest(run: IdleRun): void {
    this.leave(run.name)
    this.idle.set(run.name, run)
  }

  /** A run is in memory, or nowhere. */
  leave(name: string): void {
    this.stored.delete(name)
    this.idle.delete(name)
  }

  /** Does what reads the folder of an absent run. Where that cannot be read the run is told to be so from here on. */
  async reading<T>(name: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work()
    } catch (error) {
      const known = unreadable(name, error)
      if (isOfTheFiles(known)) {
        this.leave(name)
        this.stored.set(name, errorText(known))
      }
      throw known
    }
  }
}

/** What a client is told of a run that does not exist. One ends after `idle_seconds` of rest, or with 0 never. */
export function notFound(name: string, idle_seconds: number): ServiceError {
  const ended =
    idle_seconds === 0 ? '' : `; without a data folder one ends after ${idle_seconds} seconds without a connection`
  return new ServiceError('RUN_NOT_FOUND', `there is no run '${name}'${ended}`)
}

/** What a client is told of an error that came of reading a run's folder. */
export function unreadable(name: string, error: unknown): unknown {
  const message = `run '${name}' cannot be restored: ${errorText(error)}`
  if (error instanceof UnreadableError || isOfValues(error)) return new ServiceError('CHECKPOINT_UNREADABLE', message)
  return isFromSystem(error) || error instanceof StoreError ? new ServiceError('STORAGE_FAILED', message) : error
}

/** Whether the files are at fault, and not a lack of room or the name of the checkpoint that was asked for. */
function isOfTheFiles(error: unknown): boolean {
  return !(error instanceof ServiceError) || ['CHECKPOINT_UNREADABLE', 'STORAGE_FAILED'].includes(error.code)
}

/** Whether what a file declares is none that an `open` could have declared. */
function isOfValues(error: unknown): boolean {
  return error instanceof ServiceError && error.status === 422
}

/** Whether the file system has refused something, as opposed to a file that is not what it should be. */
function isFromSystem(error: unknown): boolean {
  return error instanceof Error && 'syscall' in error
}
