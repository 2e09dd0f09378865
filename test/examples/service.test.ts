import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import t from 'tap'
import { startService } from '../../examples/service.js'

const READY = "console.log(JSON.stringify({ address: 'http://here', args: process.argv }))\nsetInterval(() => {}, 1000)"

t.test('a service is ready when it says where it listens, and gone when it was stopped', async (t) => {
  const folder = t.testdir({ 'ready.mjs': `console.log('{}')\n${READY}` })
  const { url, pid, stop } = await startService(join(folder, 'ready.mjs'))
  t.equal(url, 'http://here')
  await stop()
  t.throws(() => process.kill(pid, 0), { code: 'ESRCH' })
})

t.test('a service that says nothing in time is ended, and refused', async (t) => {
  const folder = t.testdir({ 'silent.mjs': 'setInterval(() => {}, 1000)' })
  await t.rejects(startService(join(folder, 'silent.mjs'), { ready_seconds: 0.2 }), {
    message: 'the service ended before it was ready, or was not within 0.2 s',
  })
})

t.test('a service does not outlive a process that a signal ends', async (t) => {
  const module = new URL('../../examples/service.js', import.meta.url)
  const starts = `import { startService } from '${module}'
const { pid } = await startService(process.argv[2])
console.log(pid)
setInterval(() => {}, 1000)`
  const folder = t.testdir({ 'ready.mjs': READY, 'starts.mjs': starts })
  for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
    const parent = spawn(process.execPath, [join(folder, 'starts.mjs'), join(folder, 'ready.mjs')], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const [line] = await once(parent.stdout, 'data')
    const child = Number(line)
    process.kill(child, 0)
    parent.kill(signal)
    t.same(await once(parent, 'exit'), [null, signal])
    while (isAlive(child)) await new Promise((resolve) => setImmediate(resolve))
    t.pass(`gone with ${signal}`)
  }
})

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}
