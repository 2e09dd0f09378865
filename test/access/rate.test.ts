import t from 'tap'
import { Rate } from '../../src/access/rate.js'

t.test('what comes beyond half a second of the limit waits until it would have come at the limit', async (t) => {
  const rate = new Rate(() => 1000, 0)
  rate.spend(500, 0)
  t.equal(rate.wait(0), 0)
  rate.spend(1000, 0)
  t.equal(rate.wait(0), 1000)
  t.equal(rate.wait(500), 500)
  t.equal(rate.wait(1000), 0)
  rate.spend(500, 1500)
  t.equal(rate.wait(1500), 0, 'a debt that is paid is no credit beyond the half second')
})

t.test('without a limit nothing waits, and a limit that is taken away lets go at once', async (t) => {
  let limit: number | undefined
  const rate = new Rate(() => limit, 0)
  rate.spend(1e12, 0)
  t.equal(rate.wait(0), 0)
  limit = 1000
  rate.spend(10_000, 0)
  t.equal(rate.wait(0), 9500)
  limit = undefined
  t.equal(rate.wait(0), 0)
})

t.test('the bytes of the last second are told, and none where nothing came', async (t) => {
  const rate = new Rate(() => undefined, 0)
  rate.spend(300, 10)
  t.equal(rate.last(20), 0)
  t.equal(rate.last(1100), 300)
  rate.spend(50, 1200)
  t.equal(rate.last(1300), 300)
  t.equal(rate.last(5000), 0)
})
