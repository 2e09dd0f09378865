import { mock } from 'node:test'
import t from 'tap'
import { BACKOFF, backoffSeconds, sleep } from '../../../src/client/steps/backoff.js'

const turn = () => new Promise((resolve) => setImmediate(resolve))

t.test('the wait doubles up to its bound, and half of it is random', (t) => {
  const table: [attempt: number, random: number, atLeast: number, seconds: number][] = [
    [0, 0, 0, 0.05],
    [0, 0.5, 0, 0.075],
    [1, 0, 0, 0.1],
    [3, 0, 0, 0.4],
    [60, 0, 0, 5],
    [0, 0, 7, 7.05],
  ]
  for (const [attempt, random, atLeast, seconds] of table) {
    const given = backoffSeconds(attempt, { ...BACKOFF, random: () => random }, atLeast)
    t.ok(Math.abs(given - seconds) < 1e-12, `attempt ${attempt}: ${given} s is ${seconds} s`)
  }
  const drawn = BACKOFF.random()
  t.ok(drawn >= 0 && drawn < 1)
  t.end()
})

t.test('a wait lasts its seconds', async (t) => {
  mock.timers.enable({ apis: ['setTimeout'] })
  t.teardown(() => mock.timers.reset())
  let over = false
  const waiting = sleep(2.5, new AbortController().signal).then(() => {
    over = true
  })
  mock.timers.tick(2499)
  await turn()
  t.equal(over, false)
  mock.timers.tick(1)
  await waiting
  t.equal(over, true)
})

t.test('a wait ends with the signal, for its reason', async (t) => {
  const stop = new AbortController()
  const waiting = sleep(3600, stop.signal)
  stop.abort(new Error('enough'))
  await t.rejects(waiting, { message: 'enough' })
})
