import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import { type StateFile, stateFile } from '../keep/state-file.js'
import type { Run } from '../run/run.js'
import { turn } from '../run/slices.js'

/** How many may read state of one run at a time. */
export const MOST_READERS = 8

/** A run's state at one moment, for all who read it at that moment. */
type Shared = { key: string; file: StateFile; grant: Grant; readers: number }

/**
 * Who reads state over REST. The memory that they keep from being given back is admitted like a run's: a run's state
 * is kept once for all its readers, as it is after one step, and until the last of them has gone nobody reads that of
 * another step.
 */
export class StateReaders {
  readonly #device: Device
  readonly #counts = new Map<Run, { readers: number }>()
  readonly #shared = new Map<Run, Shared>()
  /** The last turn of the event loop that a reader was given. */
  #lastTurn = Promise.resolve()

  constructor(device: Device) {
    this.#device = device
  }

  /** Counts one more reader of a run; the answer counts it out, once. Throws OVERLOADED over MOST_READERS. */
  enter(run: Run): () => void {
    const counted = this.#counts.get(run) ?? { readers: 0 }
    if (counted.readers >= MOST_READERS)
      throw overloaded(`${counted.readers} readers have state of run '${run.name}', at most ${MOST_READERS} may`)
    counted.readers += 1
    this.#counts.set(run, counted)
    return once(() => {
      counted.readers -= 1
      if (counted.readers === 0) this.#counts.delete(run)
    })
  }

  /**
   * Keeps memory beside that of the runs, which tensors of a run may take when it has gone on; the answer gives it
   * back. Throws OVER_CAPACITY.
   */
  keep(run: Run, tensors: readonly { unit: number; bytes: number }[]): Grant {
    const needed = run.grant.bytes.map(() => 0)
    for (const { unit, bytes } of tensors) needed[unit] += bytes
    return this.#device.reserve(needed, `a reader of the state of run '${run.name}'`)
  }

  /**
   * The state of a run after its last finished step; `release` when it was read. Throws STEP_INCOMPLETE where a step
   * has begun, OVERLOADED where others read that of another step, and OVER_CAPACITY.
   */
  file(run: Run): { file: StateFile; release: () => void } {
    const leave = this.enter(run)
    try {
      const shared = this.#join(run)
      const release = once(() => {
        leave()
        this.#leave(run, shared)
      })
      return { file: shared.file, release }
    } catch (error) {
      leave()
      throw error
    }
  }

  /**
   * Pieces of state, `bytes` in all, which are made as they are read. All readers together make one in each turn of
   * the event loop: a socket that takes all it is given asks for the next piece in the same turn, and many such sockets
   * may open at once.
   */
  async *inTurns<T extends Uint8Array>(pieces: Iterable<T>, bytes: number): AsyncGenerator<T, void, void> {
    let rest = bytes
    await this.#nextTurn()
    for (const piece of pieces) {
      yield piece
      rest -= piece.length
      // The state is given back as soon as the last piece was taken, and not when others have had their turns.
      if (rest > 0) await this.#nextTurn()
    }
  }

  /** Resolves in a turn of the event loop that no other reader is given. */
  #nextTurn(): Promise<void> {
    this.#lastTurn = this.#lastTurn.then(turn)
    return this.#lastTurn
  }

  #join(run: Run): Shared {
    const key = `${run.step} ${run.digest}`
    const shared = this.#shared.get(run) ?? this.#open(run, key)
    if (shared.key !== key) {
      const [step] = shared.key.split(' ')
      throw overloaded(
        `${shared.readers} readers have the state of run '${run.name}' after step ${step}, which comes first`,
      )
    }
    run.checkBetween('its state is read between two steps')
    shared.readers += 1
    return shared
  }

  #open(run: Run, key: string): Shared {
    const file = stateFile(this.#device, run)
    try {
      const shared = { key, file, grant: this.keep(run, file.tensors), readers: 0 }
      this.#shared.set(run, shared)
      return shared
    } catch (error) {
      file.release()
      throw error
    }
  }

  #leave(run: Run, shared: Shared): void {
    shared.readers -= 1
    if (shared.readers > 0) return
    this.#shared.delete(run)
    shared.file.release()
    this.#device.dismiss(shared.grant)
  }
}

function overloaded(message: string): ServiceError {
  return new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
}

function once(work: () => void): () => void {
  let done = false
  return () => {
    if (!done) work()
    done = true
  }
}
