import { createHash } from 'node:crypto'
import t from 'tap'
import { alone, elementsOf, evenly, gradientsOf, MODEL, type Model } from '../members/crew.js'
import { bytesOf, normal, startService } from '../service.js'
import { exactMeanOf, meanOf } from './oracle.js'
import { closeTroop, openTroop, receipts, send, updatesOf } from './troop.js'

const service = await startService()
t.teardown(() => service.app.close())

const FLAT: Model = {
  groups: [{ name: 's', algorithm: 'sgd', lr: 1 }],
  parameters: [
    { name: 'w', shape: [150, 125], group: 's' },
    { name: 'b', shape: [3], group: 's' },
  ],
}
const WEIGHTS = [
  [1, 1],
  [1, 1, 1],
  [3, 1.5, 0.25, 1e-3],
  [1e300, 1e300, 1, 5e299, 1e300],
]

for (const weights of WEIGHTS) {
  t.test(
    `the mean of replicas with weights ${weights} is the float64 one to 1e-6, and the formula's bits`,
    async (t) => {
      const replicas = weights.length
      const troop = await openTroop(service.url, `mean-${weights.join('-').replaceAll('+', '')}`, {
        model: FLAT,
        split: evenly(FLAT, 2),
        replicas,
      })
      const sent = FLAT.parameters.map((one, p) =>
        weights.map((weight, r) => ({ weight, values: normal(7 * r + p + 1, elementsOf(one)) })),
      )
      for (const [r, replica] of [...troop.entries()].reverse())
        send(replica, 1, { gradients: sent.map((each) => each[r]!.values), weight: weights[r]! })
      for (const replica of troop) {
        for (const receipt of await receipts(replica)) {
          t.same(
            receipt.contributors,
            weights.map((weight, replica) => ({ replica, weight })),
          )
          t.equal(receipt.contributed, true)
        }
        const updates = updatesOf(replica, FLAT)
        for (const [p, each] of sent.entries()) {
          // Plain sgd: the update is the gradient.
          t.same(updates[p], bytesOf(meanOf(each)))
          const exact = exactMeanOf(each)
          const got = new Float32Array(updates[p]!.buffer)
          const largest = Math.max(...each.flatMap(({ values }) => [...values].map(Math.abs)))
          t.ok(got.every((value, i) => Math.abs(value - exact[i]!) <= 1e-6 * largest))
        }
      }
      await closeTroop(troop)
    },
  )
}

t.test('what is computed with a mean is what one member’s gradient of the same bits comes to', async (t) => {
  const steps = 3
  const sent = [0, 1, 2].map((replica) => gradientsOf(MODEL, { seed: 100 * replica + 3, steps }))
  const means = Array.from({ length: steps }, (_, s) =>
    MODEL.parameters.map((_, p) => meanOf(sent.map((each) => ({ values: each[s]![p]!, weight: 1 })))),
  )
  const expected = await alone(service.url, 'mean-alone', { model: MODEL, steps: means })
  const troop = await openTroop(service.url, 'averaged', { model: MODEL, split: evenly(MODEL, 3), replicas: 3 })
  for (const [s, { updates, receipt }] of expected.entries()) {
    for (const [r, replica] of troop.entries()) send(replica, s + 1, { gradients: sent[r]![s]! })
    for (const replica of troop) {
      const [got] = await receipts(replica)
      t.match(got, { gradient_norm: receipt.gradient_norm, applied: receipt.applied })
      t.not(got?.digest, receipt.digest, 'the digest says that it was a mean')
      t.same(updatesOf(replica, MODEL), updates)
    }
  }
  await closeTroop(troop)
})

t.test('the digest has the weights and what each replica sent', async (t) => {
  const model: Model = {
    groups: [{ name: 's', algorithm: 'sgd', lr: 0.5 }],
    parameters: [{ name: 'w', shape: [2, 2], group: 's' }],
  }
  const troop = await openTroop(service.url, 'digest', { model, split: evenly(model, 1), replicas: 2 })
  send(troop[0]!, 1, { gradients: [Float32Array.of(1, 2, 3, 4)], weight: 3 })
  send(troop[1]!, 1, { gradients: [Float32Array.of(1, 2, 3, 4)], weight: 1 })
  const digest = (await receipts(troop[0]!))[0]?.digest
  // The fingerprint is that of docs/protocol.md's example.
  const fingerprint = 0x4430b1e95d8285d2n
  const record = Buffer.alloc(5 + 8 + 8 + 4 + 2 * 20 + 8 + 16)
  let at = record.writeUInt32LE(0)
  at = record.writeUInt8(1 + 4, at)
  at = record.writeDoubleLE(1, at)
  at = record.writeBigUInt64LE(fingerprint, at)
  at = record.writeUInt32LE(2, at)
  for (const [replica, weight] of [
    [0, 3],
    [1, 1],
  ] as const) {
    at = record.writeUInt32LE(replica, at)
    at = record.writeDoubleLE(weight, at)
    at = record.writeBigUInt64LE(fingerprint, at)
  }
  at = record.writeBigUInt64LE(fingerprint, at)
  at = record.writeDoubleLE(-0.5, at)
  record.writeDoubleLE(0, at)
  const first = createHash('sha256').update('muond digest 1').digest()
  const step = Buffer.alloc(8)
  step.writeBigUInt64LE(1n)
  t.equal(digest, createHash('sha256').update(first).update(step).update(record).digest('hex'))
  await closeTroop(troop)
})

for (const dtype of ['bfloat16', 'float16'] as const) {
  t.test(`replicas that send ${dtype} have a mean in float32`, async (t) => {
    const model: Model = {
      groups: [
        { name: 's', algorithm: 'sgd', lr: 1 },
        { name: 'm', algorithm: 'muon', lr: 0.02 },
      ],
      parameters: [
        { name: 'w', shape: [6, 5], group: 's', gradient_dtype: dtype },
        { name: 'm', shape: [6, 5], group: 'm', gradient_dtype: dtype },
      ],
    }
    const troop = await openTroop(service.url, dtype, { model, split: evenly(model, 2), replicas: 3 })
    // 1 + k/8 in both types: three eighths have one bit more than bfloat16 has, divided by three.
    const values = [0, 1, 2].map((r) =>
      Float32Array.from({ length: 30 }, (_, i) => (1 + ((i + r) % 8) / 8) * 2 ** (i % 3)),
    )
    const patterns = values.map((each) => Uint16Array.from(each, (value) => patternOf(value, dtype)))
    for (const [r, replica] of troop.entries()) {
      for (const mate of replica) {
        for (const p of mate.own) mate.client.gradient(p, 1, { values: patterns[r]!, extent: mate.extent(p) })
        mate.end(1)
      }
    }
    for (const replica of troop) {
      await receipts(replica)
      const [update] = updatesOf(replica, model)
      t.same(update, bytesOf(meanOf(values.map((each) => ({ values: each, weight: 1 })))))
    }
    await closeTroop(troop)
  })
}

/** The bits of a number that the type holds exactly, above 2^-14. */
function patternOf(value: number, dtype: 'bfloat16' | 'float16'): number {
  const [bits] = new Uint32Array(Float32Array.of(value).buffer)
  return dtype === 'bfloat16' ? bits! >>> 16 : (bits! >>> 13) - (112 << 10)
}
