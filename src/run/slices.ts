import { setImmediate } from 'node:timers/promises'

/** Work takes the event loop for so many milliseconds at a time: everybody else's frames and probes come between. */
const SLICE_MS = 10

/**
 * Does work that yields from time to time. Short work is done when the call returns, and its result is returned;
 * longer work goes on in later turns of the event loop, and its result is promised.
 */
export function inSlices<T>(work: Generator<undefined, T>): T | Promise<T> {
  const slice = nextSlice(work)
  return slice.done ? slice.value : rest(work)
}

/** Resolves in the next turn of the event loop. */
export function turn(): Promise<void> {
  return setImmediate()
}

/** When work that begins now has had the event loop for long enough, by performance.now(). */
export function sliceEnd(): number {
  return performance.now() + SLICE_MS
}

async function rest<T>(work: Generator<undefined, T>): Promise<T> {
  for (;;) {
    await turn()
    const slice = nextSlice(work)
    if (slice.done) return slice.value
  }
}

function nextSlice<T>(work: Generator<undefined, T>): IteratorResult<undefined, T> {
  const until = sliceEnd()
  for (;;) {
    const step = work.next()
    if (step.done || performance.now() >= until) return step
  }
}
