/** Does work that yields from time to time without a pause, for whoever has nothing else to do meanwhile. */
export function atOnce<T>(work: Generator<undefined, T>): T {
  for (;;) {
    const { done, value } = work.next()
    if (done) return value
  }
}
