import { bytesPerElement } from '../kernels/dtype.js'
import { Connection } from '../src/client/connection.js'
import { chunksOf } from '../src/wire/chunks.js'
import { PROTOCOL, type ReceiptFrame, type ServerFrame } from '../src/wire/frame.js'
import { elementsOf, type Model } from './models.js'

/**
 * A trainer that computes nothing: its gradients are all the same noise, and it counts updates without applying them.
 */
export type Trainer = {
  /** One step, from the first gradient byte to the receipt; throws if not every update byte came. */
  step(): Promise<{ seconds: number; receipt: ReceiptFrame }>
  close(): Promise<void>
}

/** Opens a run of `model` over the client's own connection. */
export async function startTrainer(url: URL, model: Model): Promise<Trainer> {
  const connection = await Connection.open({ url }, new AbortController().signal)
  const { groups, parameters } = model
  const opening = nextFrame(connection, 'opened')
  await connection.send({ type: 'open', protocol: PROTOCOL, run: 'bench', groups, parameters })
  const { chunk_bytes } = (await opening).limits
  const gradients = gradientsOf(model)
  let step = 0
  return {
    step: async () => {
      step += 1
      const received = { bytes: 0 }
      const started = performance.now()
      const receiving = nextFrame(connection, 'receipt', received)
      for (const [parameter, bytes] of gradients.entries()) {
        for (const { offset, length } of chunksOf(bytes.length, chunk_bytes)) {
          await connection.sendData(
            { type: 'gradient', parameter, step, offset },
            bytes.subarray(offset, offset + length),
          )
        }
      }
      await connection.send({ type: 'end', step })
      const receipt = await receiving
      const sent = gradients.reduce((sum, { length }) => sum + length, 0)
      if (received.bytes !== sent)
        throw new Error(`step ${step} sent ${sent} bytes of gradients and got ${received.bytes} of updates`)
      return { seconds: (performance.now() - started) / 1000, receipt }
    },
    close: () => connection.close(new Error('the benchmark is over')),
  }
}

/** The next frame of a type; the bytes of the updates before it are added to `received`. */
function nextFrame<T extends ServerFrame['type']>(connection: Connection, type: T, received = { bytes: 0 }) {
  return new Promise<Extract<ServerFrame, { type: T }>>((resolve, reject) => {
    connection.onClosed = reject
    connection.onFrame = (frame) => {
      if (frame.type === 'update') received.bytes += frame.data?.length ?? 0
      else if (isType(frame, type)) resolve(frame)
      else reject(new Error(`the service sent ${JSON.stringify(frame)}, expected was ${type}`))
    }
  })
}

function isType<T extends ServerFrame['type']>(
  frame: ServerFrame,
  type: T,
): frame is Extract<ServerFrame, { type: T }> {
  return frame.type === type
}

/** The gradients of all parameters: views of one block of noise, so that the trainer needs little memory. */
function gradientsOf({ parameters, dtype }: Model): Uint8Array[] {
  const values = noise(Math.max(...parameters.map(elementsOf)))
  // The upper half of a float32 is the bfloat16 next to it towards zero.
  const tensor = dtype === 'float32' ? values : Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16)
  const size = bytesPerElement(dtype)
  return parameters.map((parameter) => new Uint8Array(tensor.buffer, 0, elementsOf(parameter) * size))
}

/** Seeded uniform numbers in (-0.5, 0.5): mulberry32 (Tommy Ettinger, public domain). */
export function noise(count: number, seed = 1): Float32Array<ArrayBuffer> {
  const values = new Float32Array(count)
  let state = seed
  for (let i = 0; i < count; i++) {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    values[i] = ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32 - 0.5
  }
  return values
}
