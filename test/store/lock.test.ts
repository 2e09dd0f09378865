import { fork } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import t, { type Test } from 'tap'
import { lockFolder } from '../../src/store/lock.js'

/** Starts a process that locks a folder, and waits until it says so. It keeps the lock until it is killed. */
async function holder(t: Test, folder: string) {
  const module = pathToFileURL(new URL('../../src/store/lock.js', import.meta.url).pathname).href
  const script = join(folder, 'holder.mjs')
  writeFileSync(
    script,
    `import { lockFolder } from ${JSON.stringify(module)}\nawait lockFolder(process.argv[2], 0)\nprocess.on('message', () => {})\nprocess.send('locked')\n`,
  )
  const child = fork(script, [folder])
  t.teardown(() => child.kill('SIGKILL'))
  await once(child, 'message')
  return child
}

t.test('a folder that is locked is refused, and the holder is named', async (t) => {
  const folder = t.testdir({})
  const lock = await lockFolder(folder, 0)
  await t.rejects(lockFolder(folder, 0), {
    name: 'ConfigError',
    message: new RegExp(
      `^data folder '.*' is in use by process ${process.pid} on .* since .*: one service at a time writes to it$`,
    ),
  })
  lock.release()
  const next = await lockFolder(folder, 0)
  next.release()
})

t.test('a folder stays locked when somebody removes the file that says so', async (t) => {
  const folder = t.testdir({})
  const lock = await lockFolder(folder, 0)
  rmSync(join(folder, 'lock'))
  await t.rejects(lockFolder(folder, 0), { name: 'ConfigError', message: /in use by another process/ })
  lock.release()
  const next = await lockFolder(folder, 0)
  next.release()
})

t.test('a lock that cannot be written is told with its folder', async (t) => {
  const folder = t.testdir({ lock: {} })
  await t.rejects(lockFolder(folder, 0), {
    name: 'ConfigError',
    message: new RegExp(`^data folder '${folder}' is not writable: EISDIR`),
  })
})

t.test('a holder that has not said yet who it is is another process', async (t) => {
  const folder = t.testdir({})
  const lock = await lockFolder(folder, 0)
  writeFileSync(join(folder, 'lock'), '')
  await t.rejects(lockFolder(folder, 0), { message: /in use by another process/ })
  lock.release()
})

t.test('the lock of a process that was killed is free', async (t) => {
  const folder = t.testdir({ data: {} })
  const child = await holder(t, join(folder, 'data'))
  await t.rejects(lockFolder(join(folder, 'data'), 0), { message: new RegExp(`process ${child.pid} `) })
  const waiting = lockFolder(join(folder, 'data'), 60)
  child.kill('SIGKILL')
  const lock = await waiting
  t.match(readFileSync(join(folder, 'data', 'lock'), 'utf8'), `process ${process.pid} on`)
  lock.release()
})
