import t from 'tap'
import type { Parameter, Run, TransportKind } from '../../src/client/client.js'
import { gradientsOf, modelOf, randomFrom } from './model.js'
import { QUICK, startProxy } from './service.js'
import { clientOf, fresh, STEPS, service } from './trainer.js'

type Range = readonly [number, number]
const WORLD = 3

/** Each parameter cut into two ranges for each rank, some of them empty. */
function cuts(parameters: readonly Parameter[], seed: number): Range[][][] {
  const random = randomFrom(seed)
  return parameters.map(({ data }) => {
    const inner = Array.from({ length: 2 * WORLD - 1 }, () => Math.floor((random() + 1) * 0.5 * (data.length + 1)))
    const bounds = [0, ...inner.map((at) => Math.min(at, data.length)).sort((a, b) => a - b), data.length]
    return Array.from({ length: WORLD }, (_, rank) =>
      [rank, rank + WORLD].flatMap((i): Range[] => (bounds[i]! < bounds[i + 1]! ? [[bounds[i]!, bounds[i + 1]!]] : [])),
    )
  })
}

/** The elements of ranges, one behind the other. */
function part<T extends Float32Array | Uint16Array>(whole: T, ranges: readonly Range[]): T {
  const elements = ranges.flatMap(([start, stop]) => [...whole.subarray(start, stop)])
  const values = whole instanceof Float32Array ? Float32Array.from(elements) : Uint16Array.from(elements)
  return values as T
}

function put(whole: Float32Array | Uint16Array, values: Float32Array | Uint16Array, ranges: readonly Range[]): void {
  let done = 0
  for (const [start, stop] of ranges) {
    whole.set(values.subarray(done, done + stop - start), start)
    done += stop - start
  }
}

for (const [transport, budgets] of Object.entries({ websocket: [9_000, 6_000, 7_000], shm: [2_500, 3_000, 3_500] }))
  t.test(
    `members train their ranges to what one client comes to, over connections that break (${transport})`,
    async (t) => {
      const alone = modelOf(fresh())
      const run = await (await clientOf(t)).open(alone)
      const name = fresh()
      const split = cuts(alone.parameters, 3)
      const members: { run: Run; parameters: Parameter[] }[] = []
      const first = modelOf(name)
      for (let rank = 0; rank < WORLD; rank++) {
        const proxy = await startProxy(service.port, budgets.slice(rank))
        t.teardown(() => proxy.close())
        const client = await clientOf(
          t,
          { ...QUICK, retries: 30, chunk_bytes: 500, transport: transport as TransportKind },
          proxy.url,
        )
        const parameters = first.parameters.map((one, i): Parameter => {
          const ranges = split[i]![rank]!
          return { ...one, ranges, data: part(one.data, ranges) }
        })
        members.push({
          run: await client.open({ ...first, parameters, member: { rank, world_size: WORLD } }),
          parameters,
        })
      }
      t.match(
        members[0]!.run.members,
        Array.from({ length: WORLD }, (_, rank) => ({ rank })),
      )
      t.same(run.members, [])
      for (const member of members) t.equal(member.run.transport, transport)
      for (let step = 1; step <= STEPS; step++) {
        const gradients = gradientsOf(alone.parameters, step)
        const receipt = await run.step(gradients)
        const receipts = await Promise.all(
          members.map((member, rank) =>
            member.run.step(gradients.map((gradient, i) => part(gradient, split[i]![rank]!))),
          ),
        )
        for (const { digest } of receipts) t.equal(digest, receipt.digest)
      }
      for (const [i, { data }] of alone.parameters.entries()) {
        const whole = data.slice()
        whole.fill(0)
        for (const [rank, { parameters }] of members.entries()) put(whole, parameters[i]!.data, split[i]![rank]!)
        t.same(whole, data)
      }
    },
  )

t.test('QK-clip scales the rows that a member has a part of, by the largest logits of all', async (t) => {
  const groups = [{ name: 'g', algorithm: 'muonclip', lr: 0.01 }]
  const attentions = [
    { name: 'h', threshold: 10, query_heads: 2, head_dim: 2, query: { parameter: 0 }, key: { parameter: 1 } },
  ]
  const declare = (name: string) => {
    const random = randomFrom(name.length)
    return { name, shape: [4, 6], group: 'g', data: Float32Array.from({ length: 24 }, random) }
  }
  const whole = [declare('query'), declare('key')]
  const alone = await (await clientOf(t)).open({ run: fresh(), groups, attentions, parameters: whole })
  const name = fresh()
  // The cuts are in the middle of rows.
  const split: Range[][] = [[[0, 9]], [[9, 24]]]
  const members: { run: Run; parameters: Parameter[] }[] = []
  for (const [rank, ranges] of split.entries()) {
    const parameters = [declare('query'), declare('key')].map((one) => ({
      ...one,
      ranges,
      data: part(one.data, ranges),
    }))
    const options = { run: name, groups, attentions, parameters, member: { rank, world_size: 2 } }
    members.push({ run: await (await clientOf(t)).open(options), parameters })
  }
  const gradient = Float32Array.from({ length: 24 }, randomFrom(9))
  const logits = [
    [40, 1],
    [30, 90],
  ]
  const receipt = await alone.step({ query: gradient }, { skipped: ['key'], max_logits: { h: [40, 90] } })
  const receipts = await Promise.all(
    members.map(({ run }, rank) =>
      run.step({ query: part(gradient, split[rank]!) }, { skipped: ['key'], max_logits: { h: logits[rank]! } }),
    ),
  )
  t.match(receipts, [{ digest: receipt.digest, clipped_heads: { h: 2 }, max_logit: 90 }, { digest: receipt.digest }])
  for (const [i, { data }] of whole.entries()) {
    const together = new Float32Array(24)
    for (const [rank, { parameters }] of members.entries()) put(together, parameters[i]!.data, split[rank]!)
    t.same(together, data)
  }
})

t.test('ranges and data that do not fit are refused before anything is sent', async (t) => {
  const client = await clientOf(t)
  const groups = [{ name: 'g', algorithm: 'sgd', lr: 1 }]
  const open = (ranges: Range[], length: number) =>
    client.open({
      ...{ run: fresh(), groups, member: { rank: 0, world_size: 1 } },
      parameters: [{ name: 'w', shape: [4], group: 'g', ranges, data: new Float32Array(length) }],
    })
  await t.rejects(open([[2, 2]], 0), { code: 'PARAMETER_INVALID', message: /ranges\[0\] is \[2,2\]/ })
  await t.rejects(open([[0, 2]], 4), { code: 'SHAPE_MISMATCH', message: /with ranges, its data has 4 .* expected 2/ })
})
