import t from 'tap'
import { encodeFrame } from '../../src/wire/codec.js'
import { RawClient, startService } from '../service.js'

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
    t.equal(opened.parameters.length, 20_000)
    t.match(opened.parameters.at(-1), { index: 19_999, name: 'layers.19999.weight', shape: [4], step: 0 })
    t.equal(runs.get('large').parameters.length, 20_000)
    t.ok(turns > 5, `${turns} turns`)
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
