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
