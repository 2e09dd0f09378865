import t from 'tap'
import { FolderObjects } from '../../../src/store/objects/folder-objects.js'
import type { Objects } from '../../../src/store/objects/objects.js'
import { Owner } from '../../../src/store/objects/owner.js'

// The signs of life keep no process from its end; a server does, as here this timer.
const alive = setInterval(() => {}, 1000)
t.teardown(() => clearInterval(alive))

const TIMES = { wait_seconds: 0, lease_seconds: 0.3 }

/** Objects whose every request comes to `before`, which may wait or throw. */
function behind(objects: Objects, before: (call: string) => Promise<void> | void): Objects {
  return new Proxy(objects, {
    get: (target, name) => {
      const value = Reflect.get(target, name)
      if (typeof value !== 'function') return value
      return async (...of: unknown[]) => {
        await before(String(name))
        return value.apply(target, of)
      }
    },
  })
}

t.test('of many that start at once one has the store, and the others are told who', async (t) => {
  const objects = new FolderObjects(t.testdir({}))
  const starts = Array.from({ length: 6 }, () => Owner.take(objects, TIMES))
  const taken = await Promise.allSettled(starts)
  const owners = taken.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []))
  t.equal(owners.length, 1)
  for (const one of taken)
    if (one.status === 'rejected')
      t.match(one.reason, {
        name: 'ConfigError',
        message: /data store '.*' is in use by process \d+ on .* since .*: one service at a time writes to it/,
      })
  t.equal(owners[0]!.problem, undefined)
  const waiting = Owner.take(objects, { ...TIMES, wait_seconds: 60 })
  await owners[0]!.release()
  const next = await waiting
  t.equal(next.generation, owners[0]!.generation + 1, 'who waits has it as soon as it is let go of')
  await next.release()
})

t.test('one that gives no sign of life is taken to be dead, and learns of it', async (t) => {
  const objects = new FolderObjects(t.testdir({}))
  let free: (() => void) | undefined
  let held: Promise<void> | undefined
  const stopped = await Owner.take(
    behind(objects, () => held),
    TIMES,
  )
  held = new Promise((resolve) => {
    free = resolve
  })
  const next = await Owner.take(objects, TIMES)
  t.equal(next.generation, stopped.generation + 1)
  t.match(stopped.problem, /^it has not answered for \d+ seconds$/)
  const lost = new Promise<string>((resolve) => {
    stopped.onLost = resolve
  })
  free!()
  t.match(await lost, /^it was taken by process \d+ on /)
  t.match(stopped.problem, /^it was taken by process/)
  await stopped.release()
  t.equal(next.problem, undefined)
  await next.release()
})

t.test('a store that does not answer is a problem for so long', async (t) => {
  const objects = new FolderObjects(t.testdir({}))
  let fails = false
  let beats = 0
  let heard = () => {}
  const owner = await Owner.take(
    behind(objects, (call) => {
      if (call !== 'putIfUnchanged') return
      beats += 1
      heard()
      if (fails) throw new Error('it is on fire')
    }),
    TIMES,
  )
  const beat = () => {
    const wanted = beats + 2
    return new Promise<void>((resolve) => {
      heard = () => {
        if (beats >= wanted) resolve()
      }
    })
  }
  fails = true
  await beat()
  t.equal(owner.problem, 'it is on fire')
  fails = false
  await beat()
  t.equal(owner.problem, undefined)
  await owner.release()
})

t.test('a sign of life whose answer was lost is its own', async (t) => {
  const objects = new FolderObjects(t.testdir({}))
  let losses = 0
  const lossy = new Proxy(objects, {
    get: (target, name) => {
      if (name !== 'putIfUnchanged') return Reflect.get(target, name).bind?.(target) ?? Reflect.get(target, name)
      return async (...of: Parameters<Objects['putIfUnchanged']>) => {
        const version = await target.putIfUnchanged(...of)
        if (losses++ === 0) throw new Error('the answer is lost')
        return version
      }
    },
  })
  const owner = await Owner.take(lossy, TIMES)
  await t.rejects(Owner.take(objects, TIMES), { name: 'ConfigError' })
  await t.rejects(Owner.take(objects, TIMES), { name: 'ConfigError' }, 'it goes on')
  t.equal(owner.problem, undefined)
  await objects.delete(['owner.json'])
  const lost = new Promise<string>((resolve) => {
    owner.onLost = resolve
  })
  t.equal(await lost, 'it was taken by somebody who has removed owner.json')
  await objects.put('owner.json', Buffer.from('{}'))
  await t.rejects(Owner.take(objects, TIMES), {
    name: 'ConfigError',
    message: /owner\.json does not end with its SHA-256/,
  })
})
