import t from 'tap'
import type { WebSocket } from 'ws'
import { type ConnectOptions, connect } from '../../src/client/client.js'
import type { ClientFrame, ErrorFrame, ReceiptFrame, ServerFrame, UpdateFrame } from '../../src/wire/frame.js'
import { opened, type Peer, receipt, type Script, say, startPeer, startWeb } from './peer.js'
import { QUICK } from './service.js'

const ONCE: ConnectOptions = { retries: 0 }
const UPDATE: UpdateFrame = { type: 'update', parameter: 0, step: 1, offset: 0, scale: 1, decay: 0.5 }
const DRAINING: ServerFrame = { type: 'draining', deadline_seconds: 1 }

const errorFrame = (change: Partial<ErrorFrame>): ErrorFrame => ({
  type: 'error',
  code: 'INTERNAL',
  message: 'of the peer',
  status: 500,
  retryable: false,
  ...change,
})

/** Opens the run of one parameter `w` of two elements. */
async function openAt(peer: Peer, options: ConnectOptions) {
  const client = await connect(peer.url, options)
  t.teardown(() => client.close())
  const data = Float32Array.of(2, 4)
  const run = await client.open({ run: 'r', parameters: [{ name: 'w', shape: [2], group: 'all', data }] })
  return { run, data }
}

const GRADIENTS = [Float32Array.of(1, 1)]

/** A peer that answers `open` as a service does, and `end` as given. */
const answering =
  (answer: (socket: WebSocket, connection: number, step: number) => void): Script =>
  (frame: ClientFrame, socket, connection) => {
    if (frame.type === 'open') say(socket, opened())
    if (frame.type === 'end') answer(socket, connection, frame.step)
  }

/** A promise and the function that resolves it, for an event that happens once. */
class Signal {
  send: () => void = () => {}
  readonly sent = new Promise<void>((resolve) => {
    this.send = resolve
  })
}

t.test(
  'a receipt without the settings that the step had is an error: its step frame was lost on the way',
  async (t) => {
    const said = { groups: { all: { lr: 0.5 } }, gradient_scale: 2, max_logits: { a: [1, 2] } }
    const table: [title: string, answer: Partial<ReceiptFrame>, message: RegExp | undefined][] = [
      [
        'another value',
        { groups: { all: { lr: 0.1 } } },
        /has lr 0\.1 in group 'all', said was 0\.5: the step frame was lost/,
      ],
      ['no value', {}, /has lr undefined in group 'all', said was 0\.5/],
      ['no logits', { groups: said.groups, clipped_heads: { b: 1 } }, /has no max_logits of attention 'a'/],
      ['all of it', { groups: { all: { lr: 0.5, momentum: 0 } }, clipped_heads: { a: 0 } }, undefined],
    ]
    for (const [title, answer, message] of table) {
      const peer = await startPeer(answering((socket) => say(socket, UPDATE, { ...receipt(1), ...answer })))
      t.teardown(peer.close)
      const { run } = await openAt(peer, QUICK)
      const step = run.step(GRADIENTS, said)
      if (message === undefined) await t.resolves(step, title)
      else await t.rejects(step, { code: 'STEP_CONFLICT', message, fields: { step: 1 }, retryable: false }, title)
      t.equal(peer.connections(), 1, title)
    }
  },
)

t.test('what no service says ends the step with the reason, and is not retried', async (t) => {
  const table: [title: string, answer: (socket: WebSocket) => unknown, code: string, message: RegExp][] = [
    ['opened twice', (socket) => say(socket, opened()), 'FRAME_UNEXPECTED', /sent opened during a step/],
    [
      'a receipt of another step',
      (socket) => say(socket, UPDATE, receipt(2)),
      'FRAME_UNEXPECTED',
      /receipt of step 2: it is 1/,
    ],
    [
      'a receipt before the update',
      (socket) => say(socket, receipt(1)),
      'FRAME_UNEXPECTED',
      /receipt of step 1: 'w' has no update/,
    ],
    [
      'an update of another step',
      (socket) => say(socket, { ...UPDATE, step: 2 }, UPDATE),
      'FRAME_UNEXPECTED',
      /step 2, expected 1/,
    ],
    ['text', (socket) => socket.send('hello'), 'FRAME_MALFORMED', /text message/],
    ['no msgpack', (socket) => socket.send(Buffer.of(0xc1)), 'FRAME_MALFORMED', /./],
    [
      'an error of the future',
      (socket) => say(socket, errorFrame({ code: 'NOT_YET' as 'INTERNAL' })),
      'NOT_YET',
      /of the peer/,
    ],
    ['1002', (socket) => socket.close(1002), 'FRAME_MALFORMED', /closed the connection with code 1002$/],
    ['1003', (socket) => socket.close(1003, 'text'), 'FRAME_MALFORMED', /code 1003: text/],
    ['1009', (socket) => socket.close(1009), 'FRAME_TOO_LARGE', /code 1009/],
    ['1011', (socket) => socket.close(1011), 'INTERNAL', /code 1011/],
    ['4409', (socket) => socket.close(4409), 'TAKEN_OVER', /code 4409/],
  ]
  for (const [title, answer, code, message] of table) {
    const peer = await startPeer(answering(answer))
    const { run, data } = await openAt(peer, QUICK)
    await t.rejects(run.step(GRADIENTS), { code, message, retryable: false }, title)
    t.equal(peer.connections(), 1, title)
    if (!title.startsWith('a receipt of another')) t.same([...data], [2, 4], title)
    peer.close()
  }
})

t.test('a frame of a type that the client does not know is ignored', async (t) => {
  const greeting = Buffer.concat([Buffer.of(0x81, 0xa4), Buffer.from('type'), Buffer.of(0xa8), Buffer.from('greeting')])
  const peer = await startPeer(
    answering((socket) => {
      socket.send(greeting)
      say(socket, UPDATE, receipt(1))
    }),
  )
  const { run } = await openAt(peer, QUICK)
  t.match(await run.step(GRADIENTS), { step: 1 })
  t.equal(peer.connections(), 1)
  peer.close()
})

t.test('what a new connection may mend is retried', async (t) => {
  const overloaded = errorFrame({ code: 'OVERLOADED', status: 429, retryable: true, retry_after_seconds: 0.001 })
  const table: [title: string, answer: (socket: WebSocket) => unknown, code: string][] = [
    ['1012', (socket) => socket.close(1012), 'CONNECTION_LOST'],
    ['1000', (socket) => socket.close(1000), 'CONNECTION_LOST'],
    ['no close frame', (socket) => socket.terminate(), 'CONNECTION_LOST'],
    ['an update, then nothing', (socket) => say(socket, UPDATE).close(1012), 'CONNECTION_LOST'],
    ['an error', (socket) => say(socket, overloaded).close(1013), 'OVERLOADED'],
    ['an error about a gradient', (socket) => say(socket, { ...overloaded, parameter: 0 }), 'OVERLOADED'],
  ]
  for (const [title, answer, code] of table) {
    const script = answering((socket, connection) =>
      connection === 0 ? answer(socket) : say(socket, DRAINING, UPDATE, receipt(1)),
    )
    const peer = await startPeer(script)
    await t.rejects((await openAt(peer, ONCE)).run.step(GRADIENTS), { code, retryable: true }, title)
    peer.close()
    const patient = await startPeer(script)
    const { run, data } = await openAt(patient, QUICK)
    t.match(await run.step(GRADIENTS), { step: 1 }, title)
    t.same([...data], [1, 2], title)
    t.equal(patient.connections(), 2, title)
    patient.close()
  }
})

t.test('a refusal that crossed the end is told, not the end that was refused for it', async (t) => {
  const refused = errorFrame({ code: 'GRADIENT_NOT_FINITE', status: 422, parameter: 0, step: 1 })
  const incomplete = errorFrame({ code: 'STEP_INCOMPLETE', status: 409, step: 1 })
  const peer = await startPeer((frame, socket) => {
    if (frame.type === 'open') say(socket, opened())
    if (frame.type === 'end') say(socket, refused, incomplete, { ...UPDATE, parameter: 1 })
  })
  t.teardown(peer.close)
  const client = await connect(peer.url)
  t.teardown(() => client.close())
  const parameters = ['w', 'v'].map((name) => ({ name, shape: [2], group: 'all', data: Float32Array.of(2, 4) }))
  const run = await client.open({ run: 'r', parameters })
  await t.rejects(run.step([GRADIENTS[0], GRADIENTS[0]]), { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['w'] } })
  t.same(
    parameters.map(({ data }) => [...data]),
    [
      [2, 4],
      [1, 2],
    ],
    'the other update is applied',
  )
})

t.test('a refusal that comes before the last gradient withholds the end', async (t) => {
  const refused = errorFrame({ code: 'GRADIENT_NOT_FINITE', status: 422, parameter: 0, step: 1 })
  const heard = new Signal()
  const frames: string[] = []
  const peer = await startPeer((frame, socket) => {
    frames.push(frame.type)
    if (frame.type === 'open') say(socket, opened())
    if (frame.type !== 'gradient') return
    say(socket, frame.parameter === 0 ? refused : { ...UPDATE, parameter: 1 }).once('pong', heard.send)
    socket.ping()
  })
  t.teardown(peer.close)
  const client = await connect(peer.url)
  t.teardown(() => client.close())
  const parameters = ['w', 'v'].map((name) => ({ name, shape: [2], group: 'all', data: Float32Array.of(2, 4) }))
  const run = await client.open({ run: 'r', parameters })
  run.gradient('w', GRADIENTS[0])
  await heard.sent
  run.gradient('v', GRADIENTS[0])
  await t.rejects(run.end(), { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['w'] } })
  t.same(frames, ['open', 'gradient', 'gradient'])
})

t.test('a refusal that came when nothing else is to be sent is told at the end', async (t) => {
  const heard = new Signal()
  const peer = await startPeer((frame, socket) => {
    if (frame.type === 'open') say(socket, opened())
    if (frame.type !== 'gradient') return
    say(socket, errorFrame({ code: 'GRADIENT_NOT_FINITE', status: 422, parameter: 0 })).once('pong', heard.send)
    socket.ping()
  })
  t.teardown(peer.close)
  const { run } = await openAt(peer, QUICK)
  run.gradient('w', GRADIENTS[0])
  await heard.sent
  await t.rejects(run.end(), { code: 'GRADIENT_NOT_FINITE', fields: { refused: ['w'] } })
})

t.test('bad news between steps ends the connection, and the next step opens another', async (t) => {
  const table: [title: string, news: ServerFrame[], connections: number][] = [
    ['draining', [DRAINING], 1],
    ['an error', [errorFrame({})], 2],
    ['what no service says', [receipt(1)], 2],
  ]
  for (const [title, news, connections] of table) {
    const heard = new Signal()
    const peer = await startPeer((frame, socket, connection) => {
      if (frame.type === 'open') say(socket, opened(connection))
      if (frame.type !== 'end') return
      say(socket, { ...UPDATE, step: frame.step }, receipt(frame.step))
      if (frame.step > 1) return
      // A pong that comes behind the frames: the client has read them then.
      say(socket, ...news)
      socket.once('pong', heard.send)
      socket.once('close', heard.send)
      socket.ping()
    })
    const { run } = await openAt(peer, QUICK)
    await run.step(GRADIENTS)
    await heard.sent
    t.match(await run.step(GRADIENTS), { step: 2 }, title)
    t.equal(peer.connections(), connections, title)
    peer.close()
  }
})

t.test('an answer to open that does not fit is refused', async (t) => {
  const peer = await startPeer((_, socket) => say(socket, receipt(1)))
  await t.rejects(openAt(peer, QUICK), { code: 'FRAME_UNEXPECTED', message: /receipt outside a step/ })
  peer.close()
})

t.test('a dtype that this client does not know is refused, whatever the service makes of it', async (t) => {
  const peer = await startPeer((_, socket) => say(socket, opened()))
  t.teardown(peer.close)
  const client = await connect(peer.url)
  t.teardown(() => client.close())
  const parameters = [{ name: 'w', shape: [2], group: 'all', update_dtype: 'float8', data: Float32Array.of(2, 4) }]
  await t.rejects(client.open({ run: 'r', parameters }), { code: 'DTYPE_UNSUPPORTED', message: /float8/ })
})

t.test('beyond loopback every message is masked, and arrives', async (t) => {
  const peer = await startPeer(
    answering((socket) => say(socket, UPDATE, receipt(1))),
    '0.0.0.0',
  )
  t.teardown(peer.close)
  const { run, data } = await openAt(peer, QUICK)
  const gradient = Float32Array.of(3, 5)
  await run.step([gradient])
  t.same([...data], [1, 2])
  t.same([...gradient], [3, 5], 'and the gradient is as it was')
})

t.test('an upgrade that is answered with HTTP says why', async (t) => {
  const problem = JSON.stringify({ code: 'OVER_CAPACITY', detail: 'full', status: 507 })
  const table: [title: string, status: number, body: string, code: string, message: RegExp][] = [
    ['a problem', 507, problem, 'OVER_CAPACITY', /^full$/],
    ['a problem of the future', 400, '{"code":"NOT_YET","detail":7}', 'REQUEST_INVALID', /HTTP status 400/],
    ['JSON that is no object', 429, '7', 'OVERLOADED', /HTTP status 429/],
    ['null', 403, 'null', 'FORBIDDEN', /HTTP status 403/],
    ['a page', 502, '<html>', 'CONNECTION_LOST', /HTTP status 502/],
    ['a long page', 404, 'x'.repeat(1 << 20), 'NOT_FOUND', /HTTP status 404/],
  ]
  for (const [title, status, body, code, message] of table) {
    const web = await startWeb((_, response) => {
      response.writeHead(status, status === 429 ? { 'retry-after': '3' } : {}).end(body)
    })
    const fields = status === 429 ? { retry_after_seconds: 3 } : {}
    await t.rejects(connect(web.url), { code, message, status, fields }, title)
    web.close()
  }
  const echo = await startWeb(({ headers }, response) => {
    response.writeHead(400).end(JSON.stringify({ detail: `${headers.authorization} ${headers['x-trainer']}` }))
  })
  const socket = { headers: { 'x-trainer': 'seven' } }
  await t.rejects(connect(echo.url, { token: 'secret', socket }), { message: 'Bearer secret seven' })
  echo.close()
  const cut = await startWeb((_, response) => {
    response.writeHead(500, { 'content-length': '10' }).write('half', () => response.destroy())
  })
  await t.rejects(connect(cut.url), { code: 'CONNECTION_LOST' }, 'an answer that is cut')
  cut.close()
})
