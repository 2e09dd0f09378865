import t from 'tap'
import { RawClient, startService } from '../service.js'
import { EXAMPLE } from '../wire/example.js'

t.test('a service answers the replicas of the worked example with its update and its receipt', async (t) => {
  const service = await startService()
  const [open, gradient, end, update, receipt] = EXAMPLE.slice(-5).map(({ frame }) => frame)
  if (open?.type !== 'open' || gradient?.type !== 'gradient' || end?.type !== 'end' || receipt?.type !== 'receipt')
    throw new Error('the example ends with a step of a replica')
  const clients: RawClient[] = []
  for (const replica of [0, 1]) {
    const client = await RawClient.connect(service.url)
    await client.open({ ...open, member: { ...open.member!, replica } })
    clients.push(client)
  }
  const [first, second] = clients as [RawClient, RawClient]
  t.match(await first.expect('members'), { members: [{ rank: 0, replica: 1, connected: true }] })
  first.gradient(0, 1, { values: Float32Array.of(1, 2, 3, 4) })
  first.send({ type: 'end', step: 1 })
  second.gradient(0, 1, { values: gradient.data })
  second.send(end)
  const { seconds, ...expected } = receipt
  t.match(await second.expect('receipt'), expected)
  t.match(await first.expect('receipt'), expected)
  const { type, parameter, step, offset, ...sent } = Object(update)
  t.match(second.updates.get(0), sent)
  for (const client of clients) await client.close()
  await service.app.close()
})
