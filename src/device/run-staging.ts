import type { Region } from './region.js'
import { Staging } from './staging.js'

/** `bytes` of memory that are a run's alone, and what allocates them. */
export type OwnMemory = { bytes: number; allocate: (bytes: number) => Region }

/**
 * The memory that the gradients of one run are received into. The arena that all runs share is a cache: beside it a run
 * has as much memory of its own as its largest gradient takes. A gradient goes there that is larger than the arena, or
 * for which the arena has no room while the run has nothing in it. So no run waits for what another one does: it waits
 * for its own gradients alone, which need nothing but a lane.
 */
export class RunStaging {
  readonly #shared: Staging
  readonly #memory: OwnMemory
  /** Made when it is first needed, and kept: a run that needs it once needs it in every step. */
  #own: Staging | undefined
  /** Regions of the arena that the run has. */
  #held = 0
  /** Called when the run has nothing in the arena any more. */
  readonly #emptied = new Set<() => void>()

  /** `memory` was granted to the run. */
  constructor(shared: Staging, memory: OwnMemory) {
    this.#shared = shared
    this.#memory = memory
  }

  /** Bytes of the run's own memory; 0 until it is needed. */
  get ownBytes(): number {
    return this.#own?.capacity ?? 0
  }

  /** Reserves `bytes` now; undefined where the run has to wait for gradients of its own. */
  tryReserve(bytes: number): Region | undefined {
    const shared = this.#shared.fits(bytes) ? this.#shared.tryReserve(bytes) : undefined
    if (shared) return this.#count(shared)
    return this.#waitsForShared(bytes) ? undefined : this.tryReserveOwn(bytes)
  }

  /** Reserves `bytes` of the run's own memory now; undefined where it has no room. Throws OVER_CAPACITY. */
  tryReserveOwn(bytes: number): Region | undefined {
    return this.#allocated().tryReserve(bytes)
  }

  /** Reserves `bytes` when there is room; undefined if the signal aborts before. Throws OVER_CAPACITY. */
  async reserve(bytes: number, signal: AbortSignal): Promise<Region | undefined> {
    if (signal.aborted) return undefined
    return this.tryReserve(bytes) ?? this.#wait(bytes, signal)
  }

  /** Frees the run's own memory once nothing of it is reserved any more. */
  close(): void {
    this.#own?.close()
    this.#own = undefined
  }

  #allocated(): Staging {
    this.#own ??= new Staging(this.#memory.allocate(this.#memory.bytes))
    return this.#own
  }

  /** Whether a region of the arena that the run has will make room before its own memory has to. */
  #waitsForShared(bytes: number): boolean {
    return this.#held > 0 && this.#shared.fits(bytes)
  }

  #count(shared: Region): Region {
    this.#held += 1
    return shared.carve(0, shared.bytes, () => {
      shared.release()
      this.#held -= 1
      if (this.#held === 0) for (const emptied of [...this.#emptied]) emptied()
    })
  }

  #wait(bytes: number, signal: AbortSignal): Promise<Region | undefined> {
    return new Promise((resolve, reject) => {
      const queues: (() => void)[] = []
      const leave = () => {
        signal.removeEventListener('abort', abort)
        this.#emptied.delete(useOwn)
        for (const quit of queues) quit()
      }
      const grant = (region: Region | undefined) => {
        leave()
        resolve(region)
      }
      const abort = () => grant(undefined)
      const useOwn = () => {
        this.#emptied.delete(useOwn)
        try {
          const region = this.tryReserveOwn(bytes)
          if (region) grant(region)
          else queues.push(this.#allocated().wait(bytes, grant))
        } catch (error) {
          leave()
          reject(error)
        }
      }
      signal.addEventListener('abort', abort, { once: true })
      if (this.#shared.fits(bytes)) queues.push(this.#shared.wait(bytes, (shared) => grant(this.#count(shared))))
      if (this.#waitsForShared(bytes)) this.#emptied.add(useOwn)
      else useOwn()
    })
  }
}
