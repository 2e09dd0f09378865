import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { FolderObjects } from '../../../src/store/objects/folder-objects.js'
import type { Objects } from '../../../src/store/objects/objects.js'
import { openObjects } from '../../../src/store/objects/open-objects.js'
import { probe } from '../../../src/store/objects/probe.js'
import { placeOf } from '../../../src/store/objects/s3/s3-address.js'
import { S3Objects } from '../../../src/store/objects/s3/s3-objects.js'
import { TestStore } from './stores.js'

const store = await TestStore.start(t)
const KINDS: Record<string, (t: Test) => Objects> = {
  'in a folder': (t) => new FolderObjects(`${t.testdir({})}/new`),
  'in S3': () => new S3Objects(store.address(), () => {}),
}
const bytes = (text: string) => Buffer.from(text)
const all = async <T>(items: AsyncIterable<T>) => {
  const found: T[] = []
  for await (const item of items) found.push(item)
  return found.sort()
}
/** Bytes that say where they are. */
const WHOLE = Buffer.alloc((35 << 20) + 3)
for (let at = 0; at < WHOLE.length; at++) WHOLE[at] = at * 7 + at / 4096
const content = (length: number) => WHOLE.subarray(0, length)

for (const [kind, open] of Object.entries(KINDS)) {
  t.test(`objects ${kind}`, async (t) => {
    t.test('are written, read, listed and removed', async (t) => {
      const objects = open(t)
      t.same(await all(objects.list('')), [])
      t.equal(await objects.get('a/b'), undefined)
      t.equal(await objects.size('a/b'), undefined)
      const keys = Array.from({ length: 8 }, (_, i) => `a/${i}`)
      await Promise.all(keys.map((key) => objects.put(key, bytes(key))))
      await objects.put('b/x', bytes('one'))
      await objects.put('b/x', bytes('another'))
      t.same((await objects.get('b/x'))?.bytes, bytes('another'))
      t.equal(await objects.size('b/x'), 7)
      t.same(await all(objects.list('a/')), keys)
      for (const after of [3, 7]) t.same(await all(objects.list('a/', `a/${after}`)), keys.slice(after + 1))
      for await (const key of objects.list('')) {
        t.equal(key, 'a/0', 'the first one comes first')
        break
      }
      await objects.delete([...keys.slice(1), 'none'])
      t.same(await all(objects.list('')), ['a/0', 'b/x'])
      t.equal(await objects.get('a/0/below'), undefined, 'an object is no folder')
    })

    t.test('are copied from another place', async (t) => {
      const objects = open(t)
      const root = t.testdir({})
      const place = kind === 'in S3' ? store.address() : ({ kind: 'folder', root } as const)
      const source = await openObjects(place, () => {})
      await source.put('a/b', bytes('bytes'))
      t.equal(await objects.copyFrom(place, 'a/b', 'c/d'), true)
      t.same([(await objects.get('c/d'))?.bytes, await objects.size('a/b')], [bytes('bytes'), undefined])
      t.equal(await objects.copyFrom(place, 'a/none', 'c/none'), false)
      t.same(await all(objects.list('')), ['c/d'])
    })

    t.test('are written on a condition, by one of many', async (t) => {
      const objects = open(t)
      const first = await objects.putIfAbsent('k', bytes('first'))
      t.ok(first)
      t.equal(await objects.putIfAbsent('k', bytes('second')), undefined)
      t.equal((await objects.get('k'))?.version, first)
      const next = await objects.putIfUnchanged('k', bytes('third'), first!)
      t.ok(next && next !== first)
      t.equal(await objects.putIfUnchanged('k', bytes('fourth'), first!), undefined)
      t.same((await objects.get('k'))?.bytes, bytes('third'))
      await objects.delete(['k'])
      t.equal(await objects.putIfUnchanged('k', bytes('fifth'), next!), undefined, 'what is gone has changed')
      await probe(objects)
      t.same(await all(objects.list('')), [], 'a probe leaves nothing')
    })

    t.test('are uploaded in pieces of any size, and read at any place', async (t) => {
      const objects = open(t)
      // Parts have 8 MiB: none, one, one that is full, several.
      for (const length of [0, 5, 8 << 20, (8 << 20) + 1, (35 << 20) + 3]) {
        const whole = content(length)
        const upload = objects.upload('u', length)
        for (let at = 0; at < length; at += 3_000_001) await upload.write(whole.subarray(at, at + 3_000_001))
        await upload.end()
        await upload.abort()
        t.equal(await objects.size('u'), length)
        const back = Buffer.alloc(length)
        if (length > 0) await objects.readInto(back, 'u', 0)
        t.equal(Buffer.compare(back, whole), 0, `${length} bytes`)
      }
      await fc.assert(
        fc.asyncProperty(fc.nat(35 << 20), fc.integer({ min: 1, max: 1000 }), async (at, length) => {
          const part = Buffer.alloc(length)
          const expected = WHOLE.subarray(at, at + length)
          if (expected.length < length) return
          await objects.readInto(part, 'u', at)
          t.ok(part.equals(expected))
        }),
        { numRuns: 10, seed: 3 },
      )
      await t.rejects(objects.readInto(Buffer.alloc(10), 'u', (35 << 20) - 3))
    })

    t.test('that are not whole are not there, and are known until they are removed', async (t) => {
      const objects = open(t)
      const uploads = ['a/1', 'a/2', 'a/3', 'a/4', 'b/1'].map((key) => objects.upload(key, 20 << 20))
      for (const upload of uploads) await upload.write(content(9 << 20))
      const unfinished = async (prefix: string) => (await all(objects.unfinished(prefix))).map(({ key }) => key).sort()
      t.same(await all(objects.list('')), [])
      t.same(await unfinished('a/'), ['a/1', 'a/2', 'a/3', 'a/4'])
      await uploads[0]!.abort()
      const [found] = await all(objects.unfinished('b/'))
      await objects.abort(found!)
      await objects.abort(found!)
      t.same(await unfinished(''), ['a/2', 'a/3', 'a/4'])
      for (const upload of uploads) await upload.abort()
      t.same(await unfinished(''), [])
    })
  })
}

t.test('S3 that is busy, or loses what it is asked or answers, is asked again', async (t) => {
  const objects = new S3Objects(store.address(), () => {})
  const once = (kind: 'busy' | 'cut' | 'lost' | 'half', method: string, times = 1) => {
    let left = times
    store.fault = (passing) => (passing.method === method && left-- > 0 ? kind : undefined)
  }
  t.teardown(() => {
    store.fault = () => undefined
  })
  const big = content(20 << 20)
  for (const kind of ['busy', 'cut', 'lost'] as const) {
    once(kind, 'PUT')
    t.ok(await objects.putIfAbsent(`new-${kind}`, bytes(randomUUID())), `absent, ${kind}`)
    const { version } = (await objects.get(`new-${kind}`))!
    once(kind, 'PUT')
    t.ok(await objects.putIfUnchanged(`new-${kind}`, bytes(randomUUID()), version), `unchanged, ${kind}`)
    once(kind, 'PUT')
    const upload = objects.upload('big', big.length)
    await upload.write(big)
    await upload.end()
    once(kind, 'GET')
    t.same(
      await all(objects.list('new-')),
      ['new-busy', 'new-cut', 'new-lost'].slice(0, ['busy', 'cut', 'lost'].indexOf(kind) + 1),
    )
  }
  once('half', 'GET', 2)
  const back = Buffer.alloc(big.length)
  store.passed.length = 0
  await objects.readInto(back, 'big', 0)
  t.ok(back.equals(big))
  const ranges = store.passed.map(({ range }) => Number(/bytes=(\d+)/.exec(range!)![1]))
  t.ok(
    ranges.length === 3 && ranges[0] === 0 && ranges[1]! > 0 && ranges[2]! > ranges[1]!,
    'it goes on where it was cut',
  )
  once('half', 'GET')
  t.equal((await objects.get('new-cut'))?.bytes.length, 36)
})

t.test('an object is copied from another place, whole or in parts, and its bytes stay in the store', async (t) => {
  const [from, to] = [store.address(), store.address()]
  const source = new S3Objects(from, () => {})
  const whole = new S3Objects(to, () => {})
  // Parts of S3 have 5 MiB or more, the last one excepted.
  const inParts = new S3Objects(to, () => {}, 5 << 20)
  for (const length of [0, 7, (5 << 20) + 1, 12 << 20]) {
    const key = `a ~ @${length}`
    await source.put(key, content(length))
    for (const objects of [whole, inParts]) {
      store.passed.length = 0
      t.equal(await objects.copyFrom(from, key, 'b/c'), true)
      const parts = store.passed.filter(({ method, query }) => method === 'PUT' && query.has('partNumber'))
      t.equal(parts.length, objects === whole || length <= 5 << 20 ? 0 : Math.ceil(length / (5 << 20)))
      t.ok((await whole.get('b/c'))!.bytes.equals(content(length)), `${length} bytes`)
    }
  }
  for (const objects of [whole, inParts]) t.equal(await objects.copyFrom(from, 'none', 'd'), false)
  t.equal(await whole.get('d'), undefined)
  t.teardown(() => {
    store.fault = () => undefined
  })
  store.fault = ({ method, query }) => (method === 'PUT' && query.get('partNumber') === '2' ? 'denied' : undefined)
  const refusal = { name: 'StoreError', message: /copy d: 403 AccessDenied/ }
  await t.rejects(inParts.copyFrom(from, `a ~ @${12 << 20}`, 'd'), refusal)
  t.same(await all(whole.unfinished('')), [], 'nothing is left of one that cannot be copied')
  // The object goes between the question for its size and the copy.
  store.fault = ({ method, key }) => (method === 'PUT' && key.endsWith('/d') ? source.delete(['a ~ @7']) : undefined)
  t.equal(await whole.copyFrom(from, 'a ~ @7', 'd'), false)
})

t.test('each process of a cluster has a place that no other one has', (t) => {
  const address = store.address('runs/')
  const prefixOf = (origin: string) => placeOf(origin, address).prefix
  t.equal(prefixOf('http://muond-0.muond:8787'), 'runs/peers/http_muond-0.muond_8787/')
  const origins = ['http://a:1', 'http://a_1', 'http://a', 'https://a', 'http://a_:1', 'http://a!1', 'http://[::1]:1']
  t.equal(new Set(origins.map(prefixOf)).size, origins.length)
  for (const origin of origins) t.match(prefixOf(origin), /^runs\/peers\/[a-z0-9.!_-]+\/$/)
  t.end()
})

t.test('a part that cannot be uploaded is told by the next piece or by the end, and nothing is left', async (t) => {
  const samples: string[] = []
  const objects = new S3Objects(store.address(), ({ operation, failed }) => failed && samples.push(operation))
  store.fault = ({ method, query }) => (method === 'PUT' && query.get('partNumber') === '2' ? 'denied' : undefined)
  t.teardown(() => {
    store.fault = () => undefined
  })
  for (const length of [20 << 20, 48 << 20]) {
    const upload = objects.upload('big', length)
    const whole = async () => {
      for (let at = 0; at < length; at += 1 << 20) await upload.write(content(1 << 20))
      await upload.end()
    }
    await t.rejects(whole(), { name: 'StoreError', message: /upload big: 403 AccessDenied: Access Denied/ })
    await upload.abort()
    t.same(await all(objects.unfinished('')), [])
    t.equal(await objects.size('big'), undefined)
  }
  store.fault = ({ query }) => (query.has('uploads') ? 'denied' : undefined)
  const upload = objects.upload('big', 20 << 20)
  await t.rejects(upload.write(content(20 << 20)), { message: /upload big: 403/ }, 'nor one that cannot be begun')
  await upload.abort()
  t.same(samples, ['upload', 'upload', 'upload'])
})

if (store.fake)
  t.test('an answer that is none is told', async (t) => {
    const objects = new S3Objects(store.address(), () => {})
    const elsewhere = new S3Objects({ ...store.address(), bucket: 'not-there' }, () => {})
    const lacking = { name: 'StoreError', message: /404 NoSuchBucket/ }
    await t.rejects(elsewhere.get('a'), lacking)
    await t.rejects(elsewhere.putIfAbsent('a', bytes('a')), lacking)
    store.down = true
    await t.rejects(objects.get('a'), { name: 'StoreError', message: /s3:\/\/muond-test\/[^ ]+: get a: / })
    await t.rejects(objects.put('a', bytes('a')), { name: 'StoreError' })
    store.down = false
  })

if (store.fake)
  t.test('a store whose conditions are none is found out', async (t) => {
    const objects = new S3Objects(store.address(), () => {})
    const cases = [
      [
        { absent: true },
        /of 16 that write an object if there is none \(If-None-Match: \*\) at once 16 did, expected is exactly 1/,
      ],
      [{ unchanged: true }, /of 16 that write an object if it is unchanged \(If-Match\) at once 16 did/],
      [{ forgets: true }, /the object is not what it wrote/],
    ] as const
    for (const [broken, message] of cases) {
      store.fake!.broken = broken
      await t.rejects(probe(objects), { name: 'StoreError', message })
    }
    store.fake!.broken = {}
    await probe(objects)
  })
