import t, { type Test } from 'tap'
import type { WebSocket } from 'ws'
import { type ConnectOptions, connect, type OpenOptions } from '../../src/client/client.js'
import { followed } from '../../src/client/steps/handshake.js'
import type { OpenFrame, PlacedFrame, ServerFrame } from '../../src/wire/frame.js'
import { opened, type Peer, receipt, type Script, say, startPeer } from './peer.js'
import { QUICK } from './service.js'

// What a head or the process of a shard may say that no service would.

const ONCE: ConnectOptions = { ...QUICK, retries: 0 }

async function peerOf(t: Test, script: Script): Promise<Peer> {
  const peer = await startPeer(script)
  t.teardown(() => peer.close())
  return peer
}

async function openAt(t: Test, { url }: Peer, options = ONCE, attentions?: OpenOptions['attentions']) {
  const client = await connect(url, options)
  t.teardown(() => client.close())
  const parameters = ['v', 'w'].map((name) => ({ name, shape: [2], group: 'all', data: Float32Array.of(2, 4) }))
  return client.open({ run: 'r', parameters, ...(attentions && { attentions }) })
}

/** Answers an `open` of `r` and of its shards `r~0` and `r~1`; `change` is another answer for one of them. */
function heads(url: () => string, change: (frame: OpenFrame) => ServerFrame | undefined = () => undefined): Script {
  return (frame, socket) => {
    if (frame.type === 'open') say(socket, change(frame) ?? (frame.shard ? openedShard(frame) : placed(url())))
    if (frame.type === 'end') say(socket, receipt(frame.step))
  }
}

function updateOf({ parameter, step }: { parameter: number; step: number }): ServerFrame {
  return { type: 'update', parameter, step, offset: 0, scale: 0, decay: 0 }
}

const openedShard = ({ run }: OpenFrame): ServerFrame => ({ ...opened(), run })

function placed(url: string, step = 0): PlacedFrame {
  const { limits, server } = opened()
  const shards = [0, 1].map((index) => ({
    run: `r~${index}`,
    url: `${url}/v1/stream`,
    parameters: [[index, index + 1]],
  }))
  return {
    ...{ type: 'placed', run: 'r', generation: 1, step, resumed: step > 0 },
    digest: `digest of ${step}`,
    shards,
    limits,
    server,
  }
}

t.test('a run is followed from process to process, and not for ever', async (t) => {
  const home = await peerOf(t, (frame, socket) => {
    if (frame.type === 'open') say(socket, opened())
  })
  const lost: Peer = await peerOf(t, (frame, socket) => {
    if (frame.type === 'open') say(socket, { type: 'moved', run: frame.run, url: home.url })
  })
  t.equal((await openAt(t, lost)).step_count, 0)
  t.equal(home.connections(), 1)
  const round: Peer = await peerOf(t, (frame, socket) => {
    if (frame.type === 'open') say(socket, { type: 'moved', run: frame.run, url: round.url })
  })
  await t.rejects(openAt(t, round), { code: 'FRAME_UNEXPECTED', message: /was moved 5 times/ })
})

t.test('a key goes to no process without TLS because one with TLS has said so', async (t) => {
  const [safe, plain] = [new URL('wss://one.example'), new URL('ws://one.example')]
  t.equal(followed('wss://two.example/v1/stream', safe).href, 'wss://two.example/v1/stream')
  t.equal(followed('ws://two.example/v1/stream', plain).href, 'ws://two.example/v1/stream')
  t.throws(() => followed('ws://two.example', safe), { code: 'FORBIDDEN', message: /the key does not go there/ })
  for (const url of ['two', 'http://two.example']) t.throws(() => followed(url, plain), { code: 'FRAME_MALFORMED' })
})

t.test('what does not fit together is refused at open', async (t) => {
  const table: [
    title: string,
    change: (frame: OpenFrame) => ServerFrame | undefined,
    expected: { code: string; message?: RegExp },
  ][] = [
    [
      'a shard that is elsewhere',
      (frame) => (frame.shard ? { ...opened(2), run: frame.run } : undefined),
      { code: 'STEP_CONFLICT', message: /shard 'r~\d' is at step 2, run 'r' at step 0/ },
    ],
    [
      'a shard that is moved',
      (frame) => (frame.shard ? { type: 'moved', run: frame.run, url: 'ws://127.0.0.1:1' } : undefined),
      { code: 'FRAME_UNEXPECTED', message: /the service sent moved, expected opened/ },
    ],
  ]
  for (const [title, change, expected] of table) {
    const peer: Peer = await peerOf(
      t,
      heads(() => peer.url, change),
    )
    await t.rejects(openAt(t, peer), expected, title)
  }
})

t.test('an attention whose parts are in two shards is refused', async (t) => {
  const peer: Peer = await peerOf(
    t,
    heads(() => peer.url),
  )
  const attention = { name: 'a', query_heads: 1, head_dim: 1, query: { parameter: 0 }, key: { parameter: 1 } }
  await t.rejects(openAt(t, peer, ONCE, [attention]), { code: 'RUN_MISMATCH', message: /one part of an attention/ })
})

t.test('what the shards say of their opening is told as of the whole', async (t) => {
  const member = { rank: 0, world_size: 1 }
  const members = [{ rank: 0, connected: true }]
  const more = ({ shard, run }: OpenFrame): ServerFrame | undefined => {
    if (shard === undefined) return undefined
    return { ...opened(shard.index), ahead: shard.index === 0 ? [0] : [], run, note: 'slow', member, members }
  }
  const peer: Peer = await peerOf(
    t,
    heads(() => peer.url, more),
  )
  const run = await openAt(t, peer)
  t.match(run.opened, { step: 0, ahead: [0, 1], note: 'slow', member, members })
  t.same(run.members, members)
})

t.test('a whole that is another one when it is opened again is refused', async (t) => {
  const table: [title: string, again: (url: string) => ServerFrame, expected: { code: string; message?: RegExp }][] = [
    ['of one process', () => opened(), { code: 'RUN_MISMATCH', message: /does not have 2 shards any more/ }],
    [
      'of other parameters',
      (url) => {
        const frame = placed(url)
        return { ...frame, shards: frame.shards.map((shard) => ({ ...shard, parameters: [[0, 1]] })) }
      },
      { code: 'RUN_MISMATCH', message: /has other parameters than when it was opened first/ },
    ],
  ]
  for (const [title, again, expected] of table) {
    let opens = 0
    const peer: Peer = await peerOf(t, (frame, socket, connection) => {
      const change = (open: OpenFrame) => (open.shard || opens++ === 0 ? undefined : again(peer.url))
      heads(() => peer.url, change)(frame, socket, connection)
    })
    const run = await openAt(t, peer)
    await t.rejects(run.reopen(), expected, title)
  }
})

t.test('a step is taken only where this client has left the run', async (t) => {
  let opens = 0
  const peer: Peer = await peerOf(t, (frame, socket, connection) => {
    const again = (open: OpenFrame) => {
      if (open.shard) return undefined
      opens += 1
      if (opens === 1) setImmediate(() => socket.terminate())
      return opens === 1 ? undefined : placed(peer.url, 7)
    }
    heads(() => peer.url, again)(frame, socket, connection)
  })
  const run = await openAt(t, peer, { ...QUICK, retries: 3 })
  const gradients = [Float32Array.of(1, 1), Float32Array.of(1, 1)]
  await t.rejects(run.step(gradients), {
    code: 'STEP_CONFLICT',
    message: /resumed at step 7, this client is at step 0/,
  })
})

t.test('an error that is no refusal of a gradient is told before one that is', async (t) => {
  const of = { step: 1, parameter: 0, status: 422, retryable: false } as const
  const refusal = { type: 'error', code: 'GRADIENT_NOT_FINITE', message: 'NaN', ...of } as const
  const full = { type: 'error', code: 'STORAGE_FAILED', message: 'full', status: 507, retryable: false } as const
  const peer: Peer = await peerOf(t, (frame, socket, connection) => {
    if (frame.type === 'gradient') say(socket, connection % 2 === 1 ? refusal : full)
    else heads(() => peer.url)(frame, socket, connection)
  })
  const run = await openAt(t, peer)
  await t.rejects(run.step([Float32Array.of(1, 1), Float32Array.of(1, 1)]), { code: 'STORAGE_FAILED' })
})

t.test('a run of one process that has shards when it is opened again is refused', async (t) => {
  let opens = 0
  const peer: Peer = await peerOf(t, (frame, socket) => {
    if (frame.type === 'open') say(socket, opens++ === 0 ? opened() : placed(peer.url))
  })
  const run = await openAt(t, peer)
  await t.rejects(run.reopen(), {
    code: 'RUN_MISMATCH',
    message: /has 2 shards now, it was opened as one of one process/,
  })
})

t.test('the head may be slow, drain, or say what it must not', async (t) => {
  const gradients = [Float32Array.of(1, 1), Float32Array.of(1, 1)]
  const answers: [title: string, frames: ServerFrame[], expected: { code: string } | undefined][] = [
    ['the receipt', [{ type: 'draining', deadline_seconds: 1 }, receipt(1)], undefined],
    ['that of another step', [receipt(2)], { code: 'FRAME_UNEXPECTED' }],
    [
      'an error',
      [{ type: 'error', code: 'STORAGE_FAILED', message: 'full', status: 507, retryable: false }],
      { code: 'STORAGE_FAILED' },
    ],
  ]
  for (const [title, frames, expected] of answers) {
    const controls = new Set<object>()
    const peer: Peer = await peerOf(t, (frame, socket, connection) => {
      if (frame.type === 'open' && !frame.shard) controls.add(socket)
      if (frame.type === 'gradient') say(socket, updateOf(frame))
      if (frame.type === 'end' && controls.has(socket)) say(socket, ...frames)
      else heads(() => peer.url)(frame, socket, connection)
    })
    const run = await openAt(t, peer)
    if (expected) await t.rejects(run.step(gradients), expected, title)
    else t.match(await run.step(gradients), { step: 1, digest: 'digest of 1' }, title)
  }
})

t.test('after its connections were lost a checkpoint opens the run again, unless another trainer has it', async (t) => {
  const gradients = [Float32Array.of(1, 1), Float32Array.of(1, 1)]
  const checkpoint = { checkpoint: 'c', step: 0, digest: 'digest of 0', bytes: 0, created_at: '2026-01-01T00:00:00Z' }
  for (const isTaken of [false, true]) {
    const controls: WebSocket[] = []
    const peer: Peer = await peerOf(t, (frame, socket, connection) => {
      if (frame.type === 'open' && !frame.shard) controls.push(socket)
      if (frame.type === 'checkpoint') say(socket, { type: 'checkpointed', ...checkpoint })
      if (frame.type !== 'gradient') return heads(() => peer.url)(frame, socket, connection)
      say(socket, updateOf(frame))
      if (isTaken) controls[0]!.close(4409)
      else controls[0]!.terminate()
    })
    const run = await openAt(t, peer)
    const code = isTaken ? 'TAKEN_OVER' : 'CONNECTION_LOST'
    await t.rejects(run.step(gradients), { code })
    if (isTaken) await t.rejects(run.checkpoint(), { code })
    else t.match(await run.checkpoint(), checkpoint)
    t.equal(controls.length, isTaken ? 1 : 2)
  }
})
