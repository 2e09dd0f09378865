import { once } from 'node:events'
import type t from 'tap'
import { WebSocket } from 'ws'
import { type App, buildApp } from '../../src/app.js'
import { configOf, type SettingName } from '../../src/config.js'
import { decodeServerFrame, encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import type { ClientFrame, GradientFrame, OpenFrame, ReceiptFrame, ServerFrame } from '../../src/wire/frame.js'
import { known } from '../service.js'

type Settings = Partial<Record<SettingName, string | number | boolean>>
type Teardown = Pick<typeof t, 'teardown'>

/** The real service on a free port; it is drained when the test ends. */
export async function startService(t: Teardown, settings: Settings = {}): Promise<App & { url: string }> {
  const defaults: Settings = { port: 0, device: 'cpu', lanes: 1, staging_bytes: 2 ** 20, drain_seconds: 0 }
  const built = await buildApp({ config: configOf({ ...defaults, ...settings }) })
  t.teardown(() => built.app.close())
  const url = await built.app.listen({ host: '127.0.0.1', port: 0 })
  return { ...built, url }
}

export type Trainer = {
  socket: WebSocket
  send(frame: Exclude<ClientFrame, GradientFrame>): void
  /** Sends the gradients of one step and its end. */
  sendStep(step: number, gradients: readonly Float32Array[]): void
  /** The next frame of a type; frames before it are dropped. */
  next<T extends ServerFrame['type']>(type: T): Promise<Extract<ServerFrame, { type: T }>>
  /** Sends a whole step and waits for its receipt. */
  step(step: number, gradients: readonly Float32Array[]): Promise<ReceiptFrame>
}

/** A connection that speaks frames. */
export async function connect(
  url: string,
  { protocols = [], headers = {} }: { protocols?: string[]; headers?: Record<string, string> } = {},
): Promise<Trainer> {
  const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, protocols, {
    headers,
    perMessageDeflate: false,
  })
  const frames: ServerFrame[] = []
  socket.on('message', (data) => {
    frames.push(known(decodeServerFrame(data as Buffer)))
    socket.emit('frame')
  })
  await once(socket, 'open')
  const trainer: Trainer = {
    socket,
    send: (frame) => socket.send(encodeFrame(frame)),
    sendStep(step, gradients) {
      for (const [parameter, gradient] of gradients.entries()) {
        const data = new Uint8Array(gradient.buffer, gradient.byteOffset, gradient.byteLength)
        socket.send(encodeWithData({ type: 'gradient', parameter, step, offset: 0 }, data))
      }
      trainer.send({ type: 'end', step })
    },
    async next<T extends ServerFrame['type']>(type: T) {
      for (;;) {
        const frame = frames.shift()
        if (frame?.type === type) return frame as Extract<ServerFrame, { type: T }>
        if (frame === undefined) await once(socket, 'frame')
      }
    },
    async step(step, gradients) {
      trainer.sendStep(step, gradients)
      return trainer.next('receipt')
    },
  }
  return trainer
}

/** A matrix under muon, and two vectors under adamw and sgd. */
export const MODEL = {
  groups: [
    { name: 'hidden', algorithm: 'muon', momentum_form: 'heavy_ball' },
    { name: 'rest', algorithm: 'adamw' },
    { name: 'outer', algorithm: 'sgd', momentum: 0.9 },
  ],
  parameters: [
    { name: 'w', shape: [2, 3], group: 'hidden', split: [1, 1] },
    { name: 'b', shape: [3], group: 'rest' },
    { name: 's', shape: [4], group: 'outer' },
  ],
} satisfies Pick<OpenFrame, 'groups' | 'parameters'>

export const GRADIENTS = [Float32Array.of(1, 2, 3, 4, 5, 6), Float32Array.of(1, -2, 3), Float32Array.of(3, 0, 4, 0)]

/** Opens a run of MODEL. */
export async function openRun(url: string, run: string, options: Parameters<typeof connect>[1] = {}): Promise<Trainer> {
  const trainer = await connect(url, options)
  trainer.send({ type: 'open', protocol: 1, run, ...MODEL })
  await trainer.next('opened')
  return trainer
}
