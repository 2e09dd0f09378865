import t from 'tap'
import { startService } from '../service.js'
import { alone, byColumns, Crew, evenly, gradientsOf, MODEL } from './crew.js'

const service = await startService()
t.teardown(() => service.app.close())
const STEPS = gradientsOf(MODEL, { seed: 1, steps: 3 })
const reference = await alone(service.url, 'alone', { model: MODEL, steps: STEPS })

for (const world_size of [1, 2, 3, 4, 8]) {
  for (const [how, split] of [
    ['rows', evenly(MODEL, world_size)],
    ['columns', byColumns(MODEL, world_size)],
  ] as const) {
    t.test(`${world_size} members with ${how} come to what one comes to, bit for bit`, async (t) => {
      const crew = await Crew.open(service.url, `${how}-${world_size}`, { model: MODEL, split })
      for (const [i, gradients] of STEPS.entries()) {
        const { receipts, updates } = await crew.step(i + 1, gradients)
        for (const { digest } of receipts) t.equal(digest, reference[i]!.receipt.digest)
        t.same(updates, reference[i]!.updates)
      }
      await crew.close()
    })
  }
}
