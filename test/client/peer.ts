import { createServer, type RequestListener } from 'node:http'
import { type WebSocket, WebSocketServer } from 'ws'
import { decodeClientFrame, encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import type { ClientFrame, OpenedFrame, ReceiptFrame, ServerFrame } from '../../src/wire/frame.js'
import { listen } from './service.js'

export type Peer = { url: string; connections: () => number; close: () => void }

/** Gets every frame of the client and its connection's number; the answer may be one that no service would send. */
export type Script = (frame: ClientFrame, socket: WebSocket, connection: number) => void

export async function startPeer(script: Script, host = '127.0.0.1'): Promise<Peer> {
  const http = createServer()
  const server = new WebSocketServer({ server: http })
  let connections = 0
  server.on('connection', (socket) => {
    const connection = connections++
    socket.on('message', (bytes: Buffer) =>
      script(decodeClientFrame(bytes, { chunk_bytes: 1 << 22 }), socket, connection),
    )
  })
  const port = await listen(http)
  const close = () => {
    for (const socket of server.clients) socket.terminate()
    http.close()
  }
  return { url: `ws://${host}:${port}`, connections: () => connections, close }
}

/** A web server that answers an upgrade like any other request. */
export async function startWeb(answer: RequestListener): Promise<{ url: string; close: () => void }> {
  const server = createServer(answer)
  return { url: `ws://127.0.0.1:${await listen(server)}`, close: () => server.close() }
}

export function say(socket: WebSocket, ...frames: ServerFrame[]): WebSocket {
  for (const frame of frames) {
    if (frame.type !== 'update') socket.send(encodeFrame(frame))
    else socket.send(encodeWithData(frame, Buffer.alloc(8)))
  }
  return socket
}

/** The answer to `open` of a run that has taken `step` steps. */
export function opened(step = 0): OpenedFrame {
  return {
    type: 'opened',
    run: 'r',
    epoch: 1,
    step,
    resumed: step > 0,
    digest: `digest of ${step}`,
    ahead: [],
    attentions: [],
    groups: {},
    limits: { chunk_bytes: 1024 },
    server: { name: 'peer', version: '0', device: 'none' },
  }
}

export function receipt(step: number): ReceiptFrame {
  return {
    type: 'receipt',
    step,
    replayed: false,
    applied: 1,
    skipped: 0,
    gradient_norm: 0,
    groups: {},
    clipped_heads: {},
    digest: `digest of ${step}`,
    durable: false,
    seconds: { receive: 0, queue: 0, compute: 0, send: 0 },
  }
}
