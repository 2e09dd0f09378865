import type { FastifyReply } from 'fastify'
import { ServiceError } from '../errors.js'
import type { Receipt } from '../run/history.js'
import type { Run } from '../run/run.js'
import type { MemberStatus } from '../wire/frame.js'
import type { components } from './openapi.js'

/** Most event streams at a time. */
export const MAX_EVENT_STREAMS = 64
/** A reader that leaves more bytes unread is cut off. It can connect again with Last-Event-ID. */
export const MAX_BEHIND_BYTES = 1 << 20

/** So often something is sent, so that nobody on the way takes the connection for dead. */
const HEARTBEAT_MS = 15_000

type Reader = { end: () => void }

/** Server-sent events: sends every receipt of a run, and which members come and go, to each reader of the run. */
export class Events {
  #readers = new Set<Reader>()

  /** Sends the kept receipts after step `after`, then each new one. Throws OVERLOADED beyond MAX_EVENT_STREAMS. */
  open(run: Run, reply: FastifyReply, after: number): void {
    if (this.#readers.size >= MAX_EVENT_STREAMS) {
      throw new ServiceError(
        'OVERLOADED',
        `there are ${this.#readers.size} event streams, at most ${MAX_EVENT_STREAMS}`,
        { retry_after_seconds: 1 },
      )
    }
    reply.hijack()
    const { raw } = reply
    raw.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store', 'x-accel-buffering': 'no' })
    raw.flushHeaders()
    const send = (receipt: Receipt) => {
      raw.write(eventOf(receipt))
      if (raw.writableLength > MAX_BEHIND_BYTES) raw.destroy()
    }
    const reader: Reader = { end: () => raw.end() }
    this.#readers.add(reader)
    for (const receipt of run.receipts(after)) send(receipt)
    const tell = (status: MemberStatus) => {
      raw.write(`event: member\ndata: ${JSON.stringify(status)}\n\n`)
    }
    run.on('receipt', send)
    run.on('member', tell)
    // A run that leaves memory comes back as another one, which has this one's readers no more.
    run.on('gone', reader.end)
    const heartbeat = setInterval(() => raw.write(': nothing new\n\n'), HEARTBEAT_MS).unref()
    raw.once('close', () => {
      clearInterval(heartbeat)
      run.off('receipt', send)
      run.off('member', tell)
      run.off('gone', reader.end)
      this.#readers.delete(reader)
    })
  }

  /** Ends all event streams. Those of a run end when it leaves memory. */
  end(): void {
    for (const { end } of this.#readers) end()
  }
}

/** A receipt in REST: the frame without its type. */
export function receiptBody({ type: _, contributors, ...receipt }: Receipt): components['schemas']['Receipt'] {
  return { ...receipt, ...(contributors && { contributors: [...contributors] }) }
}

function eventOf(receipt: Receipt): string {
  return `id: ${receipt.step}\nevent: receipt\ndata: ${JSON.stringify(receiptBody(receipt))}\n\n`
}
