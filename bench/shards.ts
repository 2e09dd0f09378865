import type { AddressInfo } from 'node:net'
import { createServer } from 'node:net'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { startService } from '../examples/service.js'
import { connect, type Run } from '../src/client/client.js'
import { tableLines } from '../src/text-table.js'
import { elementsOf, GPT2, transformer } from './models.js'

// Seconds of a step of one, two and four processes that share the same cores: node dist/bench/shards.js --layers 2.
// All of them have as many lanes together, and the client, this process, is the same; their steps take turns, so that
// all meet the same neighbours on a shared machine.

const PROGRAM = fileURLToPath(new URL('../src/server.js', import.meta.url))
const { values } = parseArgs({
  options: {
    layers: { type: 'string', default: String(GPT2.layers) },
    vocabulary: { type: 'string', default: String(GPT2.vocabulary) },
    steps: { type: 'string', default: '5' },
    lanes: { type: 'string', default: '4' },
  },
})
const [layers, vocabulary, steps, lanes] = [values.layers, values.vocabulary, values.steps, values.lanes].map(Number)
const COUNTS = [1, 2, 4]

const model = transformer({ ...GPT2, layers, vocabulary }, { hidden: 'muon', rest: 'adamw' })
const gradients = model.parameters.map((parameter) =>
  Float32Array.from({ length: elementsOf(parameter) }, (_, i) => Math.sin(i)),
)

type Measured = { readonly processes: number; readonly run: Run; readonly seconds: number[]; stop(): Promise<void> }

/** So many processes, and a run that is spread over all of them. */
async function start(processes: number): Promise<Measured> {
  const ports = await freePorts(processes)
  const peers = ports.map((port) => `http://127.0.0.1:${port}`)
  const cluster = (peer: string) => (processes === 1 ? [] : ['--peers', peers.join(','), '--advertise', peer])
  const env = { ...process.env, ...(processes > 1 && { MUOND_CLUSTER_KEY: 'the-key-of-a-benchmark' }) }
  const services = await Promise.all(
    peers.map((peer, i) => {
      const own = ['--device', 'cpu', '--lanes', String(Math.max(1, lanes / processes)), '--log-level', 'info']
      return startService(PROGRAM, { args: [...own, '--port', String(ports[i]), ...cluster(peer)], env })
    }),
  )
  const client = await connect(services[0].url.replace('http', 'ws'), { transport: 'websocket' })
  const parameters = model.parameters.map((parameter) => ({
    ...parameter,
    data: new Float32Array(elementsOf(parameter)),
  }))
  const run = await client.open({ run: 'bench', groups: model.groups, parameters, shards: processes })
  const stop = async () => {
    await client.close()
    await Promise.all(services.map((service) => service.stop()))
  }
  return { processes, run, seconds: [], stop }
}

async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'))
  await Promise.all(servers.map((server) => new Promise((resolve) => server.once('listening', resolve))))
  const ports = servers.map((server) => (server.address() as AddressInfo).port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

function median(numbers: readonly number[]): number {
  return [...numbers].sort((one, other) => one - other)[Math.floor(numbers.length / 2)]
}

const all: Measured[] = []
for (const count of COUNTS) all.push(await start(count))
// The first step allocates.
for (let step = 0; step <= steps; step++) {
  for (const { run, seconds } of all) {
    const began = performance.now()
    await run.step(gradients)
    if (step > 0) seconds.push((performance.now() - began) / 1000)
  }
}
const digests = new Set(all.map(({ run }) => run.digest))
const [one] = all
const rows = all.map(({ processes, seconds }) => {
  // Of pairs that were taken one after the other.
  const ratio = median(seconds.map((second, i) => second / one.seconds[i]))
  return [`${processes}`, median(seconds).toFixed(3), ratio.toFixed(2)]
})
console.log(`${model.name}, ${layers} layers, vocabulary ${vocabulary}: ${steps} steps, ${lanes} lanes in all`)
console.log(
  tableLines({ head: ['processes', 'seconds a step', 'of one'], align: ['right', 'right', 'right'], rows }).join('\n'),
)
console.log(digests.size === 1 ? 'equal digests' : 'FAIL: the digests differ')
await Promise.all(all.map(({ stop }) => stop()))
if (digests.size > 1) process.exitCode = 1
