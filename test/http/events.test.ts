import { once } from 'node:events'
import { connect as connectSocket } from 'node:net'
import t from 'tap'
import { MAX_EVENT_STREAMS } from '../../src/http/events.js'
import { until } from '../service.js'
import { connect, GRADIENTS, openRun, startService } from './service.js'

type Data = { step: number; measured?: object }

/** The events of a response as they come: their id, event and data. */
async function* events(response: Response): AsyncGenerator<{ id: number; event: string; data: Data }> {
  const decoder = new TextDecoderStream()
  let text = ''
  for await (const piece of response.body?.pipeThrough(decoder) ?? []) {
    text += piece
    for (let end = text.indexOf('\n\n'); end >= 0; end = text.indexOf('\n\n')) {
      const fields = Object.fromEntries(
        text
          .slice(0, end)
          .split('\n')
          .map((line) => line.split(/: (.*)/s, 2)),
      )
      text = text.slice(end + 2)
      yield { id: Number(fields.id), event: fields.event, data: JSON.parse(fields.data) }
    }
  }
}

async function next(stream: ReturnType<typeof events>) {
  const { value, done } = await stream.next()
  if (done) throw new Error('the stream has ended')
  return value
}

const listen = (url: string, headers: Record<string, string> = {}) => fetch(`${url}/v1/runs/a/events`, { headers })

t.test('each receipt is an event whose id is its step, as it happens', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  const response = await listen(url)
  t.equal(response.headers.get('content-type'), 'text/event-stream')
  const stream = events(response)
  for (const step of [2, 3]) {
    const { type, ...receipt } = await trainer.step(step, GRADIENTS)
    const { measured, ...data } = (await next(stream)).data
    t.same(data, receipt)
    t.match(measured, { finished_at: /^\d{4}-.*Z$/, update_rms: Number, gradient_bytes: 52, update_bytes: 52 })
  }
  t.match(await (await fetch(`${url}/v1/runs/a/receipts`)).json(), {
    receipts: [1, 2, 3].map((step) => ({ step, measured: { wall_seconds: Number } })),
  })
  await stream.return(undefined)
  trainer.socket.close()
})

t.test(
  'a reader that comes back with Last-Event-ID gets what it missed and is still kept, and then what happens',
  async (t) => {
    const { url } = await startService(t, { receipts_kept: 3 })
    const trainer = await openRun(url, 'a')
    for (const step of [1, 2, 3, 4]) await trainer.step(step, GRADIENTS)
    const recent = events(await listen(url, { 'last-event-id': '3' }))
    const old = events(await listen(url, { 'last-event-id': '0' }))
    await trainer.step(5, GRADIENTS)
    for (const step of [4, 5]) t.equal((await recent.next()).value.id, step)
    for (const step of [2, 3, 4, 5]) t.equal((await old.next()).value.id, step)
    await recent.return(undefined)
    await old.return(undefined)
    trainer.socket.close()
  },
)

t.test('an error that a connection of the run is told is an event, and kept', async (t) => {
  const { url, runs } = await startService(t)
  const trainer = await openRun(url, 'a')
  const stream = events(await listen(url))
  trainer.sendStep(1, [Float32Array.of(NaN, 2, 3, 4, 5, 6)])
  const expected = { rank: 0, code: 'GRADIENT_NOT_FINITE', message: /'w'/, parameter: 0, step: 1, at: /Z$/ }
  t.match(await next(stream), { event: 'refused', data: expected })
  t.match(await next(stream), { event: 'refused', data: { code: 'STEP_INCOMPLETE', step: 1 } })
  const { refusals } = (await (await fetch(`${url}/v1/runs/a/refusals`)).json()) as { refusals: object[] }
  t.match(refusals, [expected, { code: 'STEP_INCOMPLETE' }])
  t.equal(refusals.length, 2)
  for (let i = 0; i < 120; i += 1) trainer.send({ type: 'end', step: 7 })
  await until(() => runs.get('a').refusals.list().length === 100)
  for (let i = 0; i < 120; i += 1) t.match((await next(stream)).data, { code: 'STEP_CONFLICT' })
  t.equal(runs.get('a').refusals.list().length, 100, 'only the newest are kept')
  trainer.socket.close()
})

t.test('a Last-Event-ID that is no step is refused', async (t) => {
  const { url } = await startService(t)
  const response = await listen(url, { 'last-event-id': 'x' })
  t.match(
    [response.status, await response.json()],
    [400, { code: 'REQUEST_INVALID', detail: /last-event-id must be integer/i }],
  )
})

t.test('the stream ends with its run, and not with another', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  const other = await openRun(url, 'b')
  const stream = events(await listen(url))
  await fetch(`${url}/v1/runs/b`, { method: 'DELETE' })
  await trainer.step(1, GRADIENTS)
  t.equal((await stream.next()).value.id, 1)
  await fetch(`${url}/v1/runs/a`, { method: 'DELETE' })
  t.same(await stream.next(), { value: undefined, done: true })
  trainer.socket.close()
  other.socket.close()
})

t.test('the stream ends when the service closes', async (t) => {
  const { url, app } = await startService(t)
  await openRun(url, 'a')
  const stream = events(await listen(url))
  const end = stream.next()
  await app.close()
  t.same(await end, { value: undefined, done: true })
})

t.test('a reader that leaves listens no longer, and one too many is refused', async (t) => {
  const { url, runs } = await startService(t)
  const trainer = await openRun(url, 'a')
  const controllers = Array.from({ length: MAX_EVENT_STREAMS }, () => new AbortController())
  const run = runs.get('a')
  const without = run.listenerCount('receipt')
  await Promise.all(controllers.map(({ signal }) => fetch(`${url}/v1/runs/a/events`, { signal })))
  t.equal(run.listenerCount('receipt') - without, MAX_EVENT_STREAMS)
  const refused = await listen(url)
  t.match(
    [refused.status, await refused.json()],
    [429, { code: 'OVERLOADED', retryable: true, retry_after_seconds: 1 }],
  )
  for (const controller of controllers) controller.abort()
  for (let step = 1; run.listenerCount('receipt') > without; step += 1) await trainer.step(step, GRADIENTS)
  t.equal((await listen(url)).status, 200)
  trainer.socket.close()
})

t.test('a reader that does not read is cut off, and holds up nobody', async (t) => {
  const { url, runs } = await startService(t)
  const trainer = await connect(url)
  // Receipts name every group, so that many groups make them large.
  const groups = Array.from({ length: 2000 }, (_, i) => ({ name: `group-${i}`, algorithm: 'sgd' }))
  const parameters = groups.map(({ name }) => ({ name, shape: [1], group: name }))
  trainer.send({ type: 'open', protocol: 1, run: 'a', groups, parameters })
  await trainer.next('opened')
  const run = runs.get('a')
  const without = run.listenerCount('receipt')
  const reader = connectSocket(Number(new URL(url).port), '127.0.0.1')
  reader.write('GET /v1/runs/a/events HTTP/1.1\r\nhost: localhost\r\n\r\n')
  await once(reader, 'readable')
  const skipped = parameters.map((_, index) => index)
  let step = 0
  while (run.listenerCount('receipt') > without && step < 200) {
    step += 1
    trainer.send({ type: 'end', step, skipped })
    await trainer.next('receipt')
  }
  t.equal(run.listenerCount('receipt'), without, `cut off after ${step} receipts`)
  reader.destroy()
  trainer.socket.close()
})
