import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import { byColumns, evenly, gradientsOf, type Mate, MODEL } from '../members/crew.js'
import { startService } from '../service.js'
import { closeTroop, openTroop, receipts, send, updatesOf } from './troop.js'

const MOST = 3
const SENT = Array.from({ length: MOST }, (_, replica) => gradientsOf(MODEL, { seed: 500 + 100 * replica, steps: 2 }))
const WEIGHTS = [
  [1, 1, 1],
  [2, 1, 0.5],
]

const plan = fc.record({
  replicas: fc.constantFrom(2, 3),
  world_size: fc.constantFrom(1, 2, 3),
  how: fc.constantFrom('rows', 'columns'),
  weights: fc.constantFrom(0, 1),
  /** Which member does its next thing, over and over. */
  turns: fc.array(fc.nat(8), { minLength: 20, maxLength: 60 }),
  /** The connections that are cut: a member, and after how many of its frames. */
  losses: fc.array(fc.record({ id: fc.nat(8), after: fc.nat(8), step: fc.constantFrom(1, 2) }), { maxLength: 3 }),
  reversed: fc.array(fc.boolean(), { minLength: 9, maxLength: 9 }),
  chunk: fc.constantFrom(4, 20, 1024),
  /** The members whose tensors lie in shared memory. */
  shares: fc.array(fc.boolean(), { minLength: 9, maxLength: 9 }),
})
type Plan = typeof plan extends fc.Arbitrary<infer P> ? P : never

/** What a member still has to do in a step. */
function thingsOf(mate: Mate, { step, replica, plan }: { step: number; replica: number; plan: Plan }): (() => void)[] {
  const order = plan.reversed[mate.rank + replica] ? mate.own.reverse() : mate.own
  const gradients = SENT[replica]![step - 1]!
  const weight = WEIGHTS[plan.weights]![replica]!
  return [
    ...order.map((p) => () => mate.send(p, step, gradients[p]!, plan.chunk)),
    () => mate.end(step, undefined, weight),
  ]
}

/** One step of all members, whose frames come in the order of `turns`; connections are cut, and opened again. */
async function takeStep(troop: readonly (readonly Mate[])[], step: number, plan: Plan): Promise<string[]> {
  const all = troop.flatMap((replica, r) => replica.map((mate) => ({ mate, step, replica: r, plan })))
  const todo = all.map(({ mate, ...of }) => thingsOf(mate, of))
  const losses = plan.losses.filter((loss) => loss.step === step && loss.id < all.length)
  const done = all.map(() => 0)
  const turns = plan.turns.filter((id) => id < all.length)
  while (todo.some((left) => left.length > 0)) {
    const id = turns.shift() ?? todo.findIndex((left) => left.length > 0)
    todo[id]!.shift()?.()
    done[id]! += 1
    const loss = losses.findIndex((one) => one.id === id && one.after === done[id])
    if (loss < 0) continue
    losses.splice(loss, 1)
    const { mate, ...of } = all[id]!
    mate.client.socket.terminate()
    await mate.open({ takeover: true, groups: undefined, parameters: undefined })
    todo[id] = thingsOf(mate, of)
  }
  return (await receipts(all.map(({ mate }) => mate))).map(({ digest }) => digest)
}

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(`replicas in any order, cut anywhere, come to the same bits (${durability})`, async (t) => {
    const service = await startService(durability === 'journal' ? { data: t.testdir({ d: {} }), durability } : {})
    /** The same in the order of the replicas, each of one rank. */
    const references = new Map<string, { digest: string; updates: Uint8Array[] }[]>()
    const reference = async ({ replicas, weights }: Plan) => {
      const key = `${replicas}-${weights}`
      const known = references.get(key)
      if (known) return known
      const troop = await openTroop(service.url, key, { model: MODEL, split: evenly(MODEL, 1), replicas })
      const steps: { digest: string; updates: Uint8Array[] }[] = []
      for (const step of [1, 2]) {
        for (const [r, replica] of troop.entries())
          send(replica, step, { gradients: SENT[r]![step - 1]!, weight: WEIGHTS[weights]![r]! })
        const [receipt] = await receipts(troop.flat())
        steps.push({ digest: receipt!.digest, updates: updatesOf(troop[0]!, MODEL) })
      }
      await closeTroop(troop)
      references.set(key, steps)
      return steps
    }
    const property = fc.asyncProperty(plan, async (plan) => {
      const expected = await reference(plan)
      const run = randomUUID()
      const split = (plan.how === 'rows' ? evenly : byColumns)(MODEL, plan.world_size)
      const troop = await openTroop(service.url, run, { model: MODEL, split, ...plan })
      for (const step of [1, 2]) {
        const digests = await takeStep(troop, step, plan)
        const { digest, updates } = expected[step - 1]!
        if (digests.some((one) => one !== digest)) throw new Error(`digests ${digests} of step ${step}`)
        for (const replica of troop)
          for (const [i, bytes] of updatesOf(replica, MODEL).entries())
            if (Buffer.compare(bytes, updates[i]!) !== 0) throw new Error(`update ${i} of step ${step} differs`)
      }
      await closeTroop(troop)
      await fetch(`${service.http}/v1/runs/${run}`, { method: 'DELETE' })
    })
    await t.resolves(fc.assert(property, { seed: 7, numRuns: durability === 'journal' ? 15 : 40 }))
    await service.app.close()
  })
}
