import t from 'tap'
import { Cache } from '../../src/device/cache.js'

t.test('the least recently used value is dropped for one too many', async (t) => {
  const dropped: number[] = []
  const cache = new Cache<number>(2, (value) => dropped.push(value))
  const made: number[] = []
  const get = (value: number) =>
    cache.get(String(value), () => {
      made.push(value)
      return value
    })
  t.same([get(1), get(2), get(1), get(3)], [1, 2, 1, 3])
  t.same([made, dropped], [[1, 2, 3], [2]])
  get(2)
  t.same(
    [made, dropped],
    [
      [1, 2, 3, 2],
      [2, 1],
    ],
  )
  cache.clear()
  t.same(dropped, [2, 1, 3, 2])
})
