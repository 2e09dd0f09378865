import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { type Server, startServer } from '../chaos/server.js'
import { known, MODEL, type Trace, trainStep, undisturbed } from '../run/trainer.js'
import { RawClient, startService } from '../service.js'
import { TestStore } from '../store/objects/stores.js'

// A service in a process of its own is killed while a request of its checkpoint is on its way, each of them in turn: the
// next service goes on from the newest checkpoint that counts, whole, and takes the same steps.

const LAST = 9
const folder = mkdtempSync(join(tmpdir(), 'muond-kills-'))
t.teardown(() => rmSync(folder, { recursive: true }))
const store = await TestStore.start(t)

let reference: Trace[]
t.before(async () => {
  const service = await startService()
  reference = await undisturbed(service, LAST)
  await service.app.close()
})

const address = store.address()
const { data, ...settings } = store.settings(address, 0.5)
const flags = [
  ...Object.entries(settings).flatMap(([name, value]) => {
    const flag = `--${name.replaceAll('_', '-')}`
    return value === true ? [flag] : [flag, String(value)]
  }),
  ...[
    '--checkpoint-steps',
    '1',
    '--checkpoints-kept',
    '1',
    '--checkpoint-file-bytes',
    '2000',
    '--data-wait-seconds',
    '60',
  ],
]
const serve = () => startServer({ data, flags, log: join(folder, 'log') })
/** A service that has its steps in a journal, and few of them in a checkpoint, in a place of its own. */
const serveJournal = (prefix: string) => {
  const { data } = store.settings(store.address(prefix))
  const journal = ['--durability', 'journal', '--checkpoint-steps', '4']
  return startServer({ data, flags: [...flags, ...journal], log: join(folder, 'log') })
}
const connect = ({ port }: Server) => RawClient.connect(`ws://127.0.0.1:${port}/v1/stream`)

const POINTS = ['state-00001', 'state-00002', 'index.json', 'param_groups', 'manifest.json', 'run.json', 'DELETE']

t.test('a service that is killed at any request of a checkpoint leaves the run whole', async (t) => {
  let server = await serve()
  let client = await connect(server)
  let { step } = await client.open({ run: 'r', ...MODEL })
  for (const point of POINTS) {
    const held = holdBack(point)
    t.same(known([await trainStep(client, step + 1)]), known([reference[step]!]), `step ${step + 1}`)
    await held
    const gone = once(client.socket, 'close')
    await server.end('SIGKILL')
    await gone
    store.fault = () => undefined
    server = await serve()
    client = await connect(server)
    const opened = await client.open({ run: 'r', mode: 'resume' })
    t.ok(opened.step === step || opened.step === step + 1, `${point}: it goes on at step ${opened.step}`)
    step = opened.step
    if (step > 0) t.equal(opened.digest, reference[step - 1]!.digest)
  }
  t.ok(step > 0, 'some of the checkpoints count')
  await client.close()
  await server.end('SIGTERM')
})

t.test('a service with a journal that is killed has every step that it acknowledged', async (t) => {
  const prefix = `${randomUUID()}/`
  let server = await serveJournal(prefix)
  let client = await connect(server)
  let { step } = await client.open({ run: 'r', ...MODEL })
  for (const isHeld of [true, false, true]) {
    const held = isHeld ? holdBack('/journal/') : undefined
    const gone = once(client.socket, 'close')
    const told = trainStep(client, step + 1).catch(() => undefined)
    await held
    if (!isHeld) t.same(known([(await told)!]), known([reference[step++]!]), `step ${step}`)
    await server.end('SIGKILL')
    await gone
    store.fault = () => undefined
    server = await serveJournal(prefix)
    client = await connect(server)
    const opened = await client.open({ run: 'r', mode: 'resume' })
    t.equal(opened.step, step, 'what was told is there, and nothing that has not come to the store')
    if (step > 0) t.equal(opened.digest, reference[step - 1]!.digest)
  }
  await client.close()
  await server.end('SIGTERM')
})

t.test('a service that was stopped for so long that another has the store ends when it hears of it', async (t) => {
  const stopped = await serve()
  stopped.signal('SIGSTOP')
  const next = await serve()
  t.ok(next.port, 'it has the store')
  stopped.signal('SIGCONT')
  t.match(await stopped.exited, { code: 1, signal: null })
  t.equal((await next.end('SIGTERM')).code, 0)
})

/** Has requests of one kind never arrive; resolves when there is one. */
function holdBack(point: string): Promise<void> {
  return new Promise((resolve) => {
    store.fault = ({ method, key }) => {
      const isIt = point === 'DELETE' ? method === 'DELETE' : method === 'PUT' && key.includes(point)
      if (!isIt) return undefined
      resolve()
      return new Promise(() => {})
    }
  })
}
