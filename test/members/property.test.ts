import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import type { Range } from '../../src/wire/ranges.js'
import { startService } from '../service.js'
import { alone, byColumns, elementsOf, evenly, gradientsOf, Mate, MODEL, type Split } from './crew.js'

const STEPS = gradientsOf(MODEL, { seed: 11, steps: 2 })

/** Cuts of the flat parameters: some ranks get little or nothing, and some two ranges. */
function flatly(world_size: number, cuts: readonly number[]): Split {
  return MODEL.parameters.map((one, p) => {
    const elements = elementsOf(one)
    const count = 2 * world_size
    const bounds = Array.from({ length: count - 1 }, (_, i) => cuts[(p * 7 + i) % cuts.length]! % (elements + 1))
    const sorted = [0, ...bounds.sort((a, b) => a - b), elements]
    return Array.from({ length: world_size }, (_, rank) =>
      [rank, rank + world_size].flatMap((i): Range[] => {
        const [start, stop] = [sorted[i]!, sorted[i + 1]!]
        return start < stop ? [[start, stop]] : []
      }),
    )
  })
}

const plan = fc.record({
  world_size: fc.constantFrom(1, 2, 3, 4, 8),
  how: fc.constantFrom('rows', 'columns', 'flat'),
  cuts: fc.array(fc.nat(1000), { minLength: 5, maxLength: 20 }),
  /** Which member does its next thing, over and over. */
  turns: fc.array(fc.nat(7), { minLength: 20, maxLength: 60 }),
  /** The connections that are cut: a member, and after how many of its frames. */
  losses: fc.array(fc.record({ rank: fc.nat(7), after: fc.nat(8), step: fc.constantFrom(1, 2) }), { maxLength: 4 }),
  reversed: fc.array(fc.boolean(), { minLength: 8, maxLength: 8 }),
  chunk: fc.constantFrom(4, 20, 1024),
  /** The members whose tensors lie in shared memory. */
  shares: fc.array(fc.boolean(), { minLength: 8, maxLength: 8 }),
})
type Plan = typeof plan extends fc.Arbitrary<infer P> ? P : never

function splitOf({ world_size, how, cuts }: Plan): Split {
  if (how === 'rows') return evenly(MODEL, world_size)
  return how === 'columns' ? byColumns(MODEL, world_size) : flatly(world_size, cuts)
}

/** What a member still has to do in a step. */
function thingsOf(mate: Mate, step: number, { reversed, chunk }: Plan): (() => void)[] {
  const order = reversed[mate.rank] ? mate.own.reverse() : mate.own
  const gradients = STEPS[step - 1]!
  return [...order.map((p) => () => mate.send(p, step, gradients[p]!, chunk)), () => mate.end(step)]
}

/** One step of all members, whose frames come in the order of `turns`; connections are cut, and opened again. */
async function takeStep(mates: readonly Mate[], step: number, plan: Plan): Promise<string[]> {
  const todo = mates.map((mate) => thingsOf(mate, step, plan))
  const losses = plan.losses.filter((loss) => loss.step === step && loss.rank < mates.length)
  const done = mates.map(() => 0)
  const turns = [...plan.turns.filter((rank) => rank < mates.length)]
  while (todo.some((left) => left.length > 0)) {
    const rank = turns.shift() ?? todo.findIndex((left) => left.length > 0)
    todo[rank]!.shift()?.()
    done[rank]! += 1
    const loss = losses.findIndex((one) => one.rank === rank && one.after === done[rank])
    if (loss < 0) continue
    losses.splice(loss, 1)
    mates[rank]!.client.socket.terminate()
    await mates[rank]!.open({ takeover: true, groups: undefined, parameters: undefined })
    todo[rank] = thingsOf(mates[rank]!, step, plan)
  }
  return Promise.all(mates.map(async (mate) => (await mate.receipt()).digest))
}

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(`members in any order, cut anywhere, come to what one comes to (${durability})`, async (t) => {
    const service = await startService(durability === 'journal' ? { data: t.testdir({ d: {} }), durability } : {})
    const reference = await alone(service.url, 'alone', { model: MODEL, steps: STEPS })
    const state = async (run: string) =>
      Buffer.from(await (await fetch(`${service.http}/v1/runs/${run}/state`)).arrayBuffer())
    const expected = await state('alone')
    const property = fc.asyncProperty(plan, async (plan) => {
      const run = randomUUID()
      const split = splitOf(plan)
      const mates = Array.from(
        { length: plan.world_size },
        (_, rank) => new Mate(service.url, run, { model: MODEL, split, rank, shares: plan.shares[rank] }),
      )
      for (const mate of mates) await mate.open()
      for (const step of [1, 2]) {
        const digests = await takeStep(mates, step, plan)
        const { receipt, updates } = reference[step - 1]!
        const got = MODEL.parameters.map((one) => new Uint8Array(4 * elementsOf(one)))
        for (const mate of mates) mate.place(got)
        if (digests.some((digest) => digest !== receipt.digest)) throw new Error(`digests ${digests} of step ${step}`)
        for (const [i, bytes] of got.entries())
          if (Buffer.compare(bytes, updates[i]!) !== 0) throw new Error(`update ${i} of step ${step} differs`)
      }
      if (Buffer.compare(body(await state(run)), body(expected)) !== 0) throw new Error('the state differs')
      for (const mate of mates) await mate.close()
      await fetch(`${service.http}/v1/runs/${run}`, { method: 'DELETE' })
    })
    await t.resolves(fc.assert(property, { seed: 5, numRuns: durability === 'journal' ? 25 : 60 }))
    await service.app.close()
  })
}

/** The tensors of a safetensors body; its header has the run's name. */
function body(file: Buffer): Buffer {
  return file.subarray(8 + Number(file.readBigUInt64LE()))
}
