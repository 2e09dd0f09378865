import { ConfigError } from '../config.js'
import { describeState, type SourceTensor, type StateSource } from '../store/checkpoint/state-source.js'
import { readStreamHeader, TensorSplitter } from '../store/safetensors-stream.js'
import { getStream, type ServiceAddress } from './rest.js'

/** Most bytes of the header of a service's answer. Half a million parameters take about half of it. */
const HEADER_BYTES = 2 ** 29

/** Asks a service for the state of a run, in one request: `read` works once. Throws ConfigError. */
export async function openRun(service: ServiceAddress, run: string): Promise<StateSource> {
  const { body, bytes } = await getStream(service, `/v1/runs/${encodeURIComponent(run)}/state`)
  const pieces: AsyncIterator<Uint8Array> = body[Symbol.asyncIterator]()
  const { header, start, rest } = await readStreamHeader(pieces, { headerBytes: HEADER_BYTES, bytes })
  const tensors = header.ranges.map(({ begin, end, ...range }): SourceTensor => ({ ...range, bytes: end - begin }))
  const read = async function* () {
    let begun = 0
    let ready: { tensor: number; piece: Uint8Array }[] = []
    const parts = new TensorSplitter({
      header,
      start,
      sinkOf: () => {
        const tensor = begun
        begun += 1
        return (piece) => void ready.push({ tensor, piece })
      },
    })
    parts.take(rest)
    for (;;) {
      yield* ready
      ready = []
      const { done, value } = await next(pieces)
      if (done) break
      parts.take(value)
    }
    parts.end()
  }
  const close = async () => void body.destroy()
  return { description: describeState(header.metadata), tensors, read, close }
}

async function next(pieces: AsyncIterator<Uint8Array>): Promise<IteratorResult<Uint8Array>> {
  try {
    return await pieces.next()
  } catch (error) {
    throw new ConfigError(`the connection was lost before the end of the state: ${error}`)
  }
}
