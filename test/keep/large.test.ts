import { once } from 'node:events'
import t from 'tap'
import { encodeFrame } from '../../src/wire/codec.js'
import { OTHER_KEYS_BYTES } from '../../src/wire/frame.js'
import { RawClient, startService, until } from '../service.js'

const GROUPS = [{ name: 'g', algorithm: 'adamw' }]
const parametersOf = (count: number) =>
  Array.from({ length: count }, (_, i) => ({ name: `layers.${i}.weight`, shape: [4], group: 'g' }))

t.test(
  'an open of many parameters leaves the event loop to others while it is read, checked and answered',
  async (t) => {
    const { app, url, runs } = await startService({ lanes: 1, threads: 1 })
    const client = await RawClient.connect(url)
    // A turn of the event loop is counted each time, so that one long turn would count once.
    let turns = 0
    let counting = true
    const count = () => {
      turns += 1
      if (counting) setImmediate(count)
    }
    client.send({ type: 'open', protocol: 1, run: 'large', groups: GROUPS, parameters: parametersOf(20_000) })
    setImmediate(count)
    const opened = await client.expect('opened')
    counting = false
    t.equal(opened.parameters, undefined, 'what was declared is not repeated')
    t.equal(runs.get('large').parameters.length, 20_000)
    t.ok(turns > 5, `${turns} turns`)
    const heir = await RawClient.connect(url)
    const { parameters = [] } = await heir.open({ run: 'large', takeover: true })
    t.equal(parameters.length, 20_000, 'who declares nothing is told')
    t.match(parameters.at(-1), { index: 19_999, name: 'layers.19999.weight', shape: [4], step: 0, algorithm: 'adamw' })
    await heir.close()
    await client.close()
    await app.close()
  },
)

t.test('an open with too many parameters is refused before any of them is looked at', async (t) => {
  const { app, url } = await startService({ lanes: 1, threads: 1, max_parameters: 3 })
  const client = await RawClient.connect(url)
  const parameters = [{ name: 1 }, {}, { shape: 'x' }, []] as never
  client.socket.send(encodeFrame({ type: 'open', protocol: 1, run: 'r', groups: GROUPS, parameters }))
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message: 'a run holds at most 3 parameters, given are 4',
  })
  await client.close()
  await app.close()
})

t.test('a long frame of a client that is fenced while it is read is taken by nobody', async (t) => {
  const service = await startService({ lanes: 1, threads: 1 })
  const client = await RawClient.connect(service.url)
  const parameters = parametersOf(2)
  await client.open({ run: 'r', groups: GROUPS, parameters })
  const sockets = service.app.websocketServer.clients
  client.send({ type: 'end', step: 1, skipped: [0, 1, ...new Array(200_000).fill(1)] })
  await until(() => [...sockets].some(({ isPaused }) => isPaused))
  const frame = { type: 'open', protocol: 1, run: 'r', takeover: true } as const
  await service.runs.open(frame, { fence: () => {}, expel: () => {}, changed: () => {} })
  const [code] = await once(client.socket, 'close')
  t.match([code, service.runs.get('r').step, service.runs.get('r').epoch], [4409, 0, 2])
  await service.app.close()
})

t.test('a client that leaves while its open is read has opened nothing', async (t) => {
  const { app, url, runs } = await startService({ lanes: 1, threads: 1 })
  const client = await RawClient.connect(url)
  client.send({ type: 'open', protocol: 1, run: 'gone', groups: GROUPS, parameters: parametersOf(20_000) })
  client.socket.terminate()
  const other = await RawClient.connect(url)
  await other.open({ run: 'other', groups: GROUPS, parameters: parametersOf(2) })
  for (const run of runs.list()) if (run.name === 'gone') t.notOk(run.connected)
  await other.close()
  await app.close()
})

t.test('a step may skip as many parameters as a run may have', async (t) => {
  const count = 30_000
  const { app, url } = await startService({ lanes: 1, threads: 1 })
  const client = await RawClient.connect(url)
  await client.open({ run: 'sparse', groups: GROUPS, parameters: parametersOf(count) })
  const end = { type: 'end', step: 1, skipped: Array.from({ length: count }, (_, i) => i) } as const
  t.ok(encodeFrame(end).length > OTHER_KEYS_BYTES, 'it is longer than other frames may be')
  client.send(end)
  t.match(await client.expect('receipt'), { step: 1, applied: 0, skipped: count })
  await client.close()
  await app.close()
})
