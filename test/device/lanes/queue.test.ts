import fc from 'fast-check'
import t from 'tap'
import { Queue } from '../../../src/device/lanes/queue.js'

t.test('any pushes and shifts: first in, first out', async () => {
  // Runs of several thousand leave a gap at the front that is closed.
  const runs = fc.array(fc.record({ pushes: fc.nat({ max: 3000 }), shifts: fc.nat({ max: 3000 }) }), { maxLength: 12 })
  fc.assert(
    fc.property(runs, (turns) => {
      const queue = new Queue<number>()
      const [given, taken]: [number[], number[]] = [[], []]
      for (const { pushes, shifts } of turns) {
        for (let i = 0; i < pushes; i++) queue.push(given.push(given.length))
        for (let i = 0; i < shifts; i++) {
          const item = queue.shift()
          if (item !== undefined) taken.push(item)
        }
        if (queue.length !== given.length - taken.length) return false
      }
      taken.push(...queue.drain())
      return queue.length === 0 && taken.length === given.length && taken.every((item, i) => item === i + 1)
    }),
    { seed: 7, numRuns: 60 },
  )
})
