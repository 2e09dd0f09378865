import { once } from 'node:events'
import { request } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { encodeFrame, encodeHeader } from '../../src/wire/codec.js'
import type { OpenFrame } from '../../src/wire/frame.js'
import { rawFrame } from '../link/websocket/raw-frame.js'
import { RawClient } from '../service.js'

/** The service under attack, until `signal`. `reader` may only read. */
export type Target = { url: string; token: string; reader: string; signal: AbortSignal }

export type Attack = {
  name: string
  /** Bytes that the settings allow it to hold. */
  allowed: number
  isQuick: boolean
  /** A round lasts at least so long. */
  leastSeconds?: number
  attack: (target: Target) => Promise<Tried>
}

/** How much was tried in a round, and what was given that should not be. */
export type Tried = { text: string; faults?: string[] }

const MIB = 2 ** 20
const ZERO = new Uint8Array(4)
const MOST_UNFINISHED = 32 * MIB
const SEND_TIMEOUT_SECONDS = 2
// A step in between, and a reader that asks again: what is tried is to hold memory, and not to take the processor.
const [STEP_MS, READER_MS] = [300, 250]
/** What every service is started with. */
export const SETTINGS = {
  MUOND_STAGING_BYTES: String(16 * MIB),
  MUOND_UNFINISHED_BYTES: String(MOST_UNFINISHED),
  MUOND_STATE_BYTES_LIMIT: String(256 * MIB),
  MUOND_SEND_TIMEOUT_SECONDS: String(SEND_TIMEOUT_SECONDS),
  MUOND_OPEN_TIMEOUT_SECONDS: '5',
}
const ELEMENTS = 2 * MIB
const SOCKETS = 64
// Of AdamW's 16 MiB: what is in force, the next, and what readers keep; and what a service keeps of freed state.
const STATE_ALLOWED = 3 * 8 * ELEMENTS + 64 * MIB

export const ATTACKS: readonly Attack[] = [
  { name: 'nothing', allowed: 0, isQuick: false, attack: nothing },
  { name: 'keyless upgrades of /livez, 16 MiB behind each', allowed: 0, isQuick: true, attack: keylessUpgrades },
  { name: 'streams whose messages do not end', allowed: MOST_UNFINISHED, isQuick: false, attack: unfinished },
  { name: 'messages in fragments of a byte', allowed: MOST_UNFINISHED, isQuick: true, attack: fragments },
  { name: 'sockets that say nothing', allowed: 0, isQuick: false, attack: silence },
  { name: 'JSON bodies that do not end', allowed: 0, isQuick: false, attack: endlessJson },
  {
    ...{ name: 'state that is not read while steps go on', allowed: STATE_ALLOWED, isQuick: true },
    ...{ leastSeconds: 4 * SEND_TIMEOUT_SECONDS, attack: unreadState },
  },
  { name: 'requests of foreign pages', allowed: 0, isQuick: false, attack: foreignPages },
  { name: 'an arena held by a dripping gradient', allowed: 32 * MIB, isQuick: false, attack: heldArena },
  { name: 'opens of 100,001 parameters', allowed: 0, isQuick: false, attack: largeOpens },
  { name: 'the same, 16 at a time', allowed: MOST_UNFINISHED, isQuick: false, attack: manyLargeOpens },
  { name: 'opens of 12 MB of unknown keys', allowed: 0, isQuick: false, attack: unknownKeys },
  { name: 'pings that are not awaited', allowed: 0, isQuick: true, attack: pings },
]

async function nothing({ signal }: Target): Promise<Tried> {
  await ended(signal)
  return { text: '' }
}

async function keylessUpgrades(target: Target): Promise<Tried> {
  return holding(target, async () => {
    const socket = dial(target)
    socket.write(upgrade('/livez'))
    await once(socket, 'data')
    socket.write(BEGINNING)
    return socket
  })
}

async function unfinished(target: Target): Promise<Tried> {
  return holding(target, async () => {
    const socket = await stream(target)
    socket.write(BEGINNING)
    return socket
  })
}

async function fragments(target: Target): Promise<Tried> {
  const many = Buffer.concat(new Array<Buffer>(120_000).fill(rawFrame(0x00, Buffer.alloc(1), ZERO)))
  return holding(target, async () => {
    const socket = await stream(target)
    socket.write(rawFrame(0x02, Buffer.alloc(1), ZERO))
    socket.write(many)
    return socket
  })
}

async function silence(target: Target): Promise<Tried> {
  return holding(
    target,
    async () => {
      const socket = dial(target)
      await once(socket, 'connect')
      return socket
    },
    2000,
  )
}

async function endlessJson(target: Target): Promise<Tried> {
  const { url, token } = target
  let sent = 0
  const work = async () => {
    const headers = { authorization: `Bearer ${token}`, 'content-type': 'application/json' }
    const outgoing = request(`${url}/v1/runs/bystander/checkpoints`, { method: 'POST', agent: false, headers })
    outgoing.on('error', () => {})
    outgoing.on('response', (response) => response.resume())
    outgoing.write(`{"tag":"${'x'.repeat(60_000)}`)
    sent += 1
    await Promise.race([once(outgoing, 'close').catch(() => {}), ended(target.signal)])
    outgoing.destroy()
  }
  await parallel(target, work)
  return { text: `${sent} bodies` }
}

/**
 * A run of 16 MiB of state, whose steps go on. Its state is asked for with a key that may only read, and nobody reads
 * the answers: so many may be given at a time, and each for less than three windows.
 */
async function unreadState(target: Target): Promise<Tried> {
  const { url, token, signal } = target
  const headers = { authorization: `Bearer ${token}` }
  const trainer = await RawClient.connect(`${url.replace('http', 'ws')}/v1/stream`, { headers })
  const groups = [{ name: 'g', algorithm: 'adamw' }]
  const types = { gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' }
  const opened = await trainer.open({
    ...{ run: 'large', groups },
    parameters: [{ name: 'w', shape: [ELEMENTS], group: 'g', ...types }],
  })
  let { step } = opened
  const before = await overloadedOf(target)
  const seen: SeenState = { given: 0, early: 0, refused: 0, begun: performance.now() }
  const train = async () => {
    step += 1
    trainer.gradient(0, step, { values: new Uint16Array(ELEMENTS) })
    trainer.send({ type: 'end', step })
    await trainer.expect('receipt')
  }
  // Before its first step a run has no state that could be held.
  await train()
  const training = (async () => {
    while (!signal.aborted) {
      await delay(STEP_MS)
      await train()
    }
  })()
  await parallel(target, () => unreadReader(target, seen))
  const cut = (await overloadedOf(target)) - before - seen.refused
  await training
  await trainer.close()
  const { given, early, refused } = seen
  const faults = cut < early ? [`${early} held state unread for three windows, ${cut} were cut`] : []
  return { text: `${step - opened.step} steps, ${given} given state, ${cut} of them cut, ${refused} refused`, faults }
}

/** `early`: those that were given state three windows before the end of the round. */
type SeenState = { given: number; early: number; refused: number; begun: number }

/** How many the service has refused, or cut for being too slow. */
async function overloadedOf({ url, token }: Target): Promise<number> {
  const metrics = await fetch(`${url}/metrics`, { headers: { authorization: `Bearer ${token}` } })
  return Number(/^muond_errors_total{code="OVERLOADED"} (\d+)$/m.exec(await metrics.text())?.[1] ?? 0)
}

async function unreadReader(target: Target, seen: SeenState): Promise<void> {
  const socket = dial(target)
  const head = `GET /v1/runs/large/state HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ${target.reader}\r\n\r\n`
  socket.write(head)
  const [answer] = await once(socket, 'data')
  socket.pause()
  if (!String(answer.subarray(0, 12)).endsWith('200')) {
    seen.refused += 1
    socket.destroy()
    return delay(READER_MS)
  }
  seen.given += 1
  if (performance.now() - seen.begun < SEND_TIMEOUT_SECONDS * 1000) seen.early += 1
  // A socket that is not read learns of its end when it is written to; HTTP skips empty lines before a request.
  const asking = setInterval(() => socket.write('\r\n'), 100)
  await Promise.race([once(socket, 'close').catch(() => {}), ended(target.signal)])
  clearInterval(asking)
  socket.destroy()
}

async function foreignPages(target: Target): Promise<Tried> {
  const { url, token, signal } = target
  const statuses = new Map<number, number>()
  const work = async () => {
    const headers = { authorization: `Bearer ${token}`, origin: 'http://evil.example' }
    const outgoing = request(`${url}/v1/runs`, { agent: false, headers }).end()
    const answered = once(outgoing, 'response').then(([response]) => {
      response.resume()
      statuses.set(response.statusCode, (statuses.get(response.statusCode) ?? 0) + 1)
    })
    await Promise.race([answered, ended(signal)]).catch(() => {})
    await delay(20)
  }
  await parallel(target, work, 4)
  return { text: [...statuses].map(([status, count]) => `${count} answered ${status}`).join(', ') }
}

async function heldArena(target: Target): Promise<Tried> {
  const socket = await stream(target)
  const heard = followed(socket)
  const elements = 4 * MIB
  const parameters = [{ name: 'w', shape: [elements], group: 'g' }]
  send(socket, { type: 'open', protocol: 1, run: 'holder', groups: [{ name: 'g', algorithm: 'sgd' }], parameters })
  await heard('opened')
  const chunk = (offset: number, bytes: number) => {
    const header = encodeHeader({ type: 'gradient', parameter: 0, step: 1, offset }, bytes)
    return rawFrame(0x82, Buffer.concat([header, new Uint8Array(bytes)]), ZERO)
  }
  let offset = 0
  while (!target.signal.aborted && !socket.destroyed) {
    socket.write(chunk(offset, 4))
    offset += 4
    await Promise.race([delay(100), ended(target.signal)])
  }
  socket.destroy()
  return { text: `${offset} of ${4 * elements} bytes` }
}

async function largeOpens(target: Target): Promise<Tried> {
  return repeated(target, TOO_MANY)
}

async function manyLargeOpens(target: Target): Promise<Tried> {
  const tried = await Promise.all(Array.from({ length: 16 }, () => largeOpens(target)))
  return { text: `${tried.reduce((sum, { text }) => sum + Number.parseInt(text, 10), 0)} opens` }
}

async function unknownKeys(target: Target): Promise<Tried> {
  const keys = Object.fromEntries(Array.from({ length: 600_000 }, (_, i) => [`key-${i}-xxxxxxx`, 1]))
  return repeated(target, frameOf({ type: 'open', protocol: 1, run: 'r', ...keys } as OpenFrame))
}

async function pings(target: Target): Promise<Tried> {
  const many = Buffer.concat(new Array<Buffer>(500).fill(rawFrame(0x89, Buffer.alloc(125), ZERO)))
  let sent = 0
  const work = async () => {
    const socket = await stream(target)
    socket.pause()
    while (!socket.destroyed && !target.signal.aborted) {
      if (!socket.write(many)) await Promise.race([once(socket, 'drain'), once(socket, 'close'), ended(target.signal)])
      sent += 500
    }
    socket.destroy()
  }
  await parallel(target, work, 8)
  return { text: `${sent} pings` }
}

/** Sends a message again and again, on a new connection where it ended the last. */
async function repeated(target: Target, message: Buffer): Promise<Tried> {
  let sent = 0
  while (!target.signal.aborted) {
    const socket = await stream(target)
    socket.write(message)
    sent += 1
    await Promise.race([once(socket, 'data').catch(() => {}), once(socket, 'close'), ended(target.signal)])
    socket.destroy()
  }
  return { text: `${sent} opens` }
}

/** Keeps so many sockets open that `begin` makes, and makes another for each that is closed. */
async function holding(target: Target, begin: () => Promise<Socket>, count = SOCKETS): Promise<Tried> {
  let begun = 0
  const work = async () => {
    const socket = await begin()
    begun += 1
    if (!socket.destroyed) await Promise.race([once(socket, 'close'), ended(target.signal)])
    socket.destroy()
  }
  await parallel(target, work, count)
  return { text: `${begun} sockets, ${count} at a time` }
}

async function parallel({ signal }: Target, work: () => Promise<void>, count = SOCKETS): Promise<void> {
  const worker = async () => {
    while (!signal.aborted) await Promise.race([work(), ended(signal)]).catch(() => delay(10))
  }
  await Promise.all(Array.from({ length: count }, worker))
}

function dial({ url, signal }: Target): Socket {
  const socket = connect(Number(new URL(url).port), '127.0.0.1')
  socket.setMaxListeners(0)
  socket.on('error', () => {})
  signal.addEventListener('abort', () => socket.destroy(), { once: true })
  return socket
}

async function stream(target: Target): Promise<Socket> {
  const socket = dial(target)
  socket.write(upgrade('/v1/stream', target.token))
  await Promise.race([once(socket, 'data'), once(socket, 'close')])
  socket.resume()
  return socket
}

function upgrade(path: string, token?: string): string {
  const lines = [
    `GET ${path} HTTP/1.1`,
    'Host: localhost',
    'Upgrade: websocket',
    'Connection: Upgrade',
    'Sec-WebSocket-Version: 13',
    'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==',
    ...(token === undefined ? [] : [`Authorization: Bearer ${token}`]),
  ]
  return `${lines.join('\r\n')}\r\n\r\n`
}

/** The first 15 MiB of a binary message that has 16. Made once: what attackers compute, others on the machine lack. */
const BEGINNING = rawFrame(0x82, Buffer.alloc(15 * MIB), ZERO)
BEGINNING.writeBigUInt64BE(BigInt(16 * MIB), 2)

const TOO_MANY = frameOf({
  ...{ type: 'open', protocol: 1, run: 'huge', groups: [{ name: 'g', algorithm: 'sgd' }] },
  parameters: Array.from({ length: 100_001 }, (_, i) => ({ name: `w${i}`, shape: [4], group: 'g' })),
})

function frameOf(open: OpenFrame): Buffer {
  return rawFrame(0x82, encodeFrame(open), ZERO)
}

function send(socket: Socket, open: OpenFrame): void {
  socket.write(frameOf(open))
}

/** Resolves when the bytes of a frame's type have come. */
function followed(socket: Socket): (type: string) => Promise<void> {
  let text = ''
  socket.on('data', (bytes) => {
    text = (text + bytes.toString('latin1')).slice(-100_000)
  })
  return async (type) => {
    while (!text.includes(`\xa4type${String.fromCharCode(0xa0 + type.length)}${type}`) && !socket.destroyed)
      await Promise.race([once(socket, 'data'), once(socket, 'close')])
    text = ''
  }
}

function ended(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return Promise.resolve()
  return new Promise((resolve) => signal.addEventListener('abort', () => resolve(), { once: true }))
}
