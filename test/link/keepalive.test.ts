import { readFileSync } from 'node:fs'
import t from 'tap'
import { RawClient, startService } from '../service.js'

const ESTABLISHED = '01'
const KEEPALIVE_TIMER = '02'

/** The kernel's timers of the established connections with this local port (proc(5), /proc/net/tcp). */
function timersOf(port: number): string[] {
  const local = port.toString(16).toUpperCase().padStart(4, '0')
  const rows = readFileSync('/proc/net/tcp', 'utf8').split('\n').slice(1)
  return rows
    .map((row) => row.trim().split(/\s+/))
    .filter(([, address, , state]) => address?.endsWith(`:${local}`) && state === ESTABLISHED)
    .map(([, , , , , timer]) => timer!.split(':')[0]!)
}

t.test('TCP asks a silent peer whether it is still there', async (t) => {
  const { app, url } = await startService({ lanes: 1, threads: 1 })
  const client = await RawClient.connect(url)
  await client.open({
    run: 'r',
    groups: [{ name: 'g', algorithm: 'sgd' }],
    parameters: [{ name: 'w', shape: [1], group: 'g' }],
  })
  let timers: string[] = []
  // Until the client has acknowledged the last bytes the kernel's timer is the one that would send them again.
  do {
    await new Promise(setImmediate)
    timers = timersOf(Number(new URL(url).port))
  } while (timers.some((timer) => timer !== KEEPALIVE_TIMER && timer !== '00'))
  t.same(timers, [KEEPALIVE_TIMER])
  await client.close()
  await app.close()
})
