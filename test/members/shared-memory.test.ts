import t from 'tap'
import { closeTroop, openTroop, receipts, send, updatesOf } from '../replicas/troop.js'
import { normal, startService } from '../service.js'
import { alone, byColumns, Crew, elementsOf, evenly, gradientsOf, Mate, MODEL, type Model } from './crew.js'

const STEPS = gradientsOf(MODEL, { seed: 1, steps: 3 })

for (const durability of ['checkpoint', 'journal'] as const) {
  t.test(`members in shared memory come to what one comes to over the socket (${durability})`, async (t) => {
    const service = await startService(durability === 'journal' ? { data: t.testdir({ d: {} }), durability } : {})
    const reference = await alone(service.url, 'alone', { model: MODEL, steps: STEPS })
    for (const [how, split] of Object.entries({ rows: evenly(MODEL, 4), columns: byColumns(MODEL, 3) })) {
      const crew = await Crew.open(service.url, how, { model: MODEL, split, shares: true })
      for (const [i, gradients] of STEPS.entries()) {
        const { receipts, updates } = await crew.step(i + 1, gradients)
        for (const { digest } of receipts) t.equal(digest, reference[i]!.receipt.digest, how)
        t.same(updates, reference[i]!.updates, how)
      }
      await crew.close()
    }
    await service.app.close()
  })
}

t.test('a part of many megabytes is copied in several turns, both ways', async (t) => {
  const service = await startService()
  const model: Model = {
    groups: [{ name: 's', algorithm: 'sgd', lr: 0.1 }],
    parameters: [{ name: 'large', shape: [3, 2 ** 20], group: 's', gradient_dtype: 'float32' }],
  }
  const steps = [[normal(1, 3 * 2 ** 20)]]
  const [reference] = await alone(service.url, 'alone', { model, steps })
  const crew = await Crew.open(service.url, 'shared', { model, split: evenly(model, 2), shares: true })
  const { receipts, updates } = await crew.step(1, steps[0]!)
  t.equal(receipts[0]!.digest, reference!.receipt.digest)
  t.ok(Buffer.from(updates[0]!).equals(reference!.updates[0]!), 'the same update')
  const { values } = await service.metrics.received_bytes_total.get()
  t.equal(values[0]!.value, 2 * 12 * 2 ** 20, 'each element once, as by one member')
  await crew.close()
  await service.app.close()
})

t.test('NaN in a shared part is refused to all, and the rank is named', async (t) => {
  const service = await startService()
  const crew = await Crew.open(service.url, 'nan', { model: MODEL, split: evenly(MODEL, 2), shares: true })
  const [zero, one] = crew.mates as [Mate, Mate]
  const bad = Float32Array.from(STEPS[0]![0]!).fill(Number.NaN, 40)
  zero.send(0, 1, bad)
  one.send(0, 1, bad)
  for (const mate of crew.mates)
    t.match(await mate.error(), { code: 'GRADIENT_NOT_FINITE', message: /NaN or Inf was sent by rank 1/ })
  const { receipts } = await crew.step(1, STEPS[0]!)
  t.match(receipts, [{ applied: 5 }, { applied: 5 }])
  await crew.close()
  await service.app.close()
})

t.test('what a member has no elements of it cannot send', async (t) => {
  const service = await startService()
  const mate = new Mate(service.url, 'none', { model: MODEL, split: evenly(MODEL, 8), rank: 7, shares: true })
  await mate.open()
  t.notOk(mate.has(1))
  mate.client.send({ type: 'gradients', step: 1, parameters: [1] })
  const message = "rank 7 has no elements of parameter 'odd', and sends a gradient of it"
  t.match(await mate.error(), { code: 'SHAPE_MISMATCH', parameter: 1, step: 1, message })
  await mate.close()
  await service.app.close()
})

t.test('memory of a GPU is not for members: the offer is refused with the reason', async (t) => {
  const service = await startService()
  const mate = new Mate(service.url, 'gpu', { model: MODEL, split: evenly(MODEL, 2), rank: 0 })
  const handles = [new Uint8Array(64), new Uint8Array(64)]
  await mate.open({ transport: [{ kind: 'cuda-ipc', nonce: new Uint8Array(32), gpu: 'GPU-0', handles }] })
  t.match(mate.opened.transport, { kind: 'websocket', refused: [{ kind: 'cuda-ipc', reason: /the run has members/ }] })
  await mate.close()
  await service.app.close()
})

t.test('replicas send more gradients than are under way at a time, and wait for no update', async (t) => {
  const service = await startService()
  const model: Model = {
    groups: [{ name: 's', algorithm: 'sgd', lr: 0.1 }],
    parameters: Array.from({ length: 800 }, (_, i) => ({ name: `p${i}`, shape: [1 + (i % 5)], group: 's' })),
  }
  const gradients = model.parameters.map((one, i) => normal(i, elementsOf(one)))
  const split = evenly(model, 1)
  const troop = await openTroop(service.url, 'r', { model, split, replicas: 2, shares: [true, true] })
  for (const [mate] of troop) {
    mate!.put(gradients)
    mate!.client.send({ type: 'gradients', step: 1, parameters: mate!.own })
    mate!.end(1)
  }
  t.match(await receipts(troop.flat()), [{ applied: 800 }, { applied: 800 }])
  t.same(updatesOf(troop[0]!, model), updatesOf(troop[1]!, model))
  await closeTroop(troop)
  await service.app.close()
})

t.test('what a replica has missed comes over its socket', async (t) => {
  const service = await startService()
  const quorum = { min_replicas: 1, deadline_seconds: 1e-3 }
  const options = { model: MODEL, split: evenly(MODEL, 1), replicas: 3, quorum, shares: [true, true, true] }
  const troop = await openTroop(service.url, 'late', options)
  const [gradients] = STEPS
  for (const replica of troop.slice(0, 2)) send(replica, 1, { gradients: gradients! })
  await receipts(troop.slice(0, 2).flat())
  const [late] = troop[2]!
  late!.send(0, 1, gradients![0]!)
  t.match(await late!.error(), { code: 'STEP_CONFLICT', left_out: true })
  late!.send(1, 1, gradients![1]!)
  late!.end(1)
  t.match(await late!.receipt(), { step: 1, contributed: false })
  t.same(updatesOf(troop[2]!, MODEL), updatesOf(troop[0]!, MODEL))
  await closeTroop(troop)
  await service.app.close()
})
