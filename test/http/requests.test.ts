import { mock } from 'node:test'
import koffi from 'koffi'
import t from 'tap'
import { openRun, startService } from './service.js'

const JSON_TYPE = { 'content-type': 'application/json' }

async function call(
  url: string,
  method: string,
  init: { headers?: Record<string, string>; body?: string | Uint8Array<ArrayBuffer> } = {},
) {
  const response = await fetch(url, { method, ...init })
  return { status: response.status, body: await response.json() }
}

t.test('at / there are links, and each of them leads somewhere', async (t) => {
  const { url } = await startService(t)
  const { status, body } = await call(`${url}/`, 'GET')
  t.match([status, body], [200, { name: 'muond', version: /^\d/, links: { documentation: '/docs', runs: '/v1/runs' } }])
  const { links } = body as { links: Record<string, string> }
  for (const [name, path] of Object.entries(links)) {
    const { status } = await fetch(`${url}${path}`)
    t.equal(status, name === 'stream' ? 426 : 200, path)
  }
})

t.test('a body is what it says, and what is wrong in it is told with its place', async (t) => {
  const { url } = await startService(t, { data: t.testdir({}) })
  const trainer = await openRun(url, 'a')
  const cases: [string, number, RegExp][] = [
    ['{"tag":false}', 400, /body\/tag must be string/],
    ['{"tag":5}', 400, /body\/tag must be string/],
    ['{"tag":null}', 400, /body\/tag must be string/],
    ['{"tagg":"x"}', 400, /^unknown key 'tagg' in the body$/],
    ['[]', 400, /body must be object/],
    ['{', 400, /JSON/],
  ]
  for (const [body, status, detail] of cases)
    t.match(
      await call(`${url}/v1/runs/a/checkpoints`, 'POST', { headers: JSON_TYPE, body }),
      { status, body: { detail } },
      body,
    )
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST', { headers: JSON_TYPE, body: '{"tag":"x"}' }), {
    status: 201,
  })
  t.match(
    await call(`${url}/v1/runs/a/parameters?limit=1`, 'GET'),
    { status: 200, body: { total: 3 } },
    'a query is text',
  )
  trainer.socket.close()
})

t.test('a body that is coded or of another type is refused with the type that is expected', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  const body = new Uint8Array(8)
  const coded = { 'content-type': 'application/octet-stream', 'content-encoding': 'gzip' }
  t.match(await call(`${url}/v1/runs/a/state`, 'PUT', { headers: coded, body }), {
    status: 415,
    body: { code: 'REQUEST_INVALID', detail: /Content-Encoding gzip, expected none/ },
  })
  const plain = { 'content-type': 'application/octet-stream', 'content-encoding': 'identity' }
  t.match(await call(`${url}/v1/runs/a/state`, 'PUT', { headers: plain, body }), { status: 400 })
  const csv = { 'content-type': 'text/csv' }
  for (const [path, method] of [
    ['/v1/runs/a/state', 'PUT'],
    ['/v1/runs/a/checkpoints', 'POST'],
  ] as const)
    t.match(await call(`${url}${path}`, method, { headers: csv, body: 'x' }), {
      status: 415,
      body: { detail: /^Unsupported Media Type, expected application\/json, or application\/octet-stream/ },
    })
  const state = { 'content-type': 'application/octet-stream' }
  t.match(await call(`${url}/v1/runs/a/checkpoints`, 'POST', { headers: state, body }), {
    status: 415,
    body: { detail: /octet-stream, expected application\/json/ },
  })
  trainer.socket.close()
})

t.test('an event stream on which nothing happens says so every 15 seconds', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  mock.timers.enable({ apis: ['setInterval'] })
  t.teardown(() => mock.timers.reset())
  const response = await fetch(`${url}/v1/runs/a/events`)
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
  for (let i = 0; i < 2; i++) {
    mock.timers.tick(15_000)
    t.equal((await reader.read()).value, ': nothing new\n\n')
  }
  await reader.cancel()
  trainer.socket.close()
})

// A disk that is full, without one: no file of this process may grow beyond a size (setrlimit(2), RLIMIT_FSIZE).
const setrlimit = koffi.load(null).func('setrlimit', 'int', ['int', 'void *'])
const limitFiles = (bytes: bigint) => setrlimit(1, BigUint64Array.of(bytes, 2n ** 64n - 1n))
process.on('SIGXFSZ', () => {})

t.test('a service whose disk is full is not ready, and is again when there is room', async (t) => {
  const { url, restored } = await startService(t, { data: t.testdir({}) })
  await restored
  const ready = () => call(`${url}/readyz`, 'GET')
  t.match(await ready(), { status: 200 })
  limitFiles(0n)
  t.teardown(() => limitFiles(2n ** 64n - 1n))
  let answer = await ready()
  while (answer.status === 200) answer = await ready()
  t.match(answer, {
    status: 503,
    body: { code: 'STORAGE_FAILED', retryable: true, detail: /^the data folder cannot be written: EFBIG/ },
  })
  t.match(await call(`${url}/livez`, 'GET'), { status: 200 })
  limitFiles(2n ** 64n - 1n)
  while (answer.status !== 200) answer = await ready()
  t.match(answer, { status: 200 })
})
