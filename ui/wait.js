/**
 * Resolves after so many milliseconds, and not before the page is looked at: what nobody sees asks nothing of the
 * service.
 * @param {number} milliseconds
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
export async function sleep(milliseconds, signal) {
  await until((done) => {
    const timer = setTimeout(done, milliseconds)
    return () => clearTimeout(timer)
  }, signal)
  if (!document.hidden) return
  await until((done) => {
    document.addEventListener('visibilitychange', done)
    return () => document.removeEventListener('visibilitychange', done)
  }, signal)
}

/**
 * @param {(done: () => void) => () => void} start
 * @param {AbortSignal} signal
 * @returns {Promise<void>}
 */
function until(start, signal) {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason)
    const stop = start(() => {
      signal.removeEventListener('abort', abort)
      stop()
      resolve()
    })
    const abort = () => {
      stop()
      reject(signal.reason)
    }
    signal.addEventListener('abort', abort, { once: true })
  })
}
