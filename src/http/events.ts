import type { FastifyReply } from 'fastify'
import { ServiceError } from '../errors.js'
import type { Finished, Receipt, Refusal } from '../run/history.js'
import type { Run } from '../run/run.js'
import type { Measured } from '../run/step/measured.js'
import type { MemberStatus } from '../wire/frame.js'
import type { components } from './openapi.js'

/** Most event streams at a time. */
export const MAX_EVENT_STREAMS = 64
/** A reader that leaves more bytes unread is cut off. It can connect again with Last-Event-ID. */
export const MAX_BEHIND_BYTES = 1 << 20

/** So often something is sent, so that nobody on the way takes the connection for dead. */
const HEARTBEAT_MS = 15_000

type Reader = { end: () => void }

/**
 * Server-sent events: sends every receipt of a run, which members come and go, and which errors they are told, to each
 * reader of the run.
 */
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
    const write = (event: string) => {
      raw.write(event)
      if (raw.writableLength > MAX_BEHIND_BYTES) raw.destroy()
    }
    for (const { receipt, measured } of run.receipts(after)) write(receiptEvent(receipt, measured))
    const finished = (receipt: Receipt, measured: Measured) => write(receiptEvent(receipt, measured))
    const changed = (status: MemberStatus) => write(eventOf('member', status))
    const refused = (refusal: Refusal) => write(eventOf('refused', refusal))
    const reader: Reader = { end: () => raw.end() }
    this.#readers.add(reader)
    run.on('receipt', finished).on('member', changed).on('refused', refused)
    // A run that leaves memory comes back as another one, which has this one's readers no more.
    run.on('gone', reader.end)
    const heartbeat = setInterval(() => raw.write(': nothing new\n\n'), HEARTBEAT_MS).unref()
    raw.once('close', () => {
      clearInterval(heartbeat)
      run.off('receipt', finished).off('member', changed).off('refused', refused).off('gone', reader.end)
      this.#readers.delete(reader)
    })
  }

  /** Ends all event streams. Those of a run end when it leaves memory. */
  end(): void {
    for (const { end } of this.#readers) end()
  }
}

/** A receipt in REST: the frame without its type, and what this process has measured of the step. */
export function receiptBody({ receipt, measured }: Finished): components['schemas']['Receipt'] {
  const { type: _, contributors, ...rest } = receipt
  return { ...rest, ...(contributors && { contributors: [...contributors] }), ...(measured && { measured }) }
}

function receiptEvent(receipt: Receipt, measured: Measured | undefined): string {
  return `id: ${receipt.step}\n${eventOf('receipt', receiptBody({ receipt, measured }))}`
}

function eventOf(name: string, data: object): string {
  return `event: ${name}\ndata: ${JSON.stringify(data)}\n\n`
}
