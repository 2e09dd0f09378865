import { setTimeout as delay } from 'node:timers/promises'
import { encodeFrame } from '../../wire/codec.js'
import { pack } from '../../wire/pack.js'
import { Alternation } from './cuts.js'
import { type Props, type Scene, scene } from './scene.js'

/** What the service may do at any time, and no client may mind. */

const STRANGE = { weather: { sky: 'clear', wind: [1, 2.5], seen: true, map: Buffer.of(1, 2, 3) } }
const FRAGMENTS = 3

export function cuts(): Scene {
  const alternation = new Alternation()
  return {
    ...scene('cuts'),
    async down({ frame, message, link, course }) {
      const tell = (chunk: Buffer) => link.tell(chunk, FRAGMENTS)
      if (frame.type === 'update' && frame.data) {
        this.acted = true
        alternation.add({ ...frame, data: frame.data }, course.unitOf(frame.parameter), tell)
        return []
      }
      alternation.flush(tell)
      return [message]
    },
  }
}

export function unknown(): Scene {
  const strange = pack({ ...STRANGE, type: 'weather' }, { is: 'map', required: {}, optional: {} })
  return {
    ...scene('unknown'),
    async down({ frame }) {
      this.acted = true
      return [strange, encodeFrame({ ...STRANGE, ...frame })]
    },
  }
}

export function ping(): Scene {
  let isAnswered = false
  return {
    ...scene('ping'),
    async down({ message, link }) {
      if (!this.acted)
        link.ping(() => {
          isAnswered = true
        })
      this.acted = true
      return [message]
    },
    lacks: () => (isAnswered ? undefined : 'the ping was not answered before the next step began'),
  }
}

/** It reads nothing, and then says nothing, for a while. */
export function slow({ slow_seconds }: Props): Scene {
  let isSilent = true
  return {
    ...scene('slow'),
    async up({ message, link }) {
      if (this.acted) return message
      this.acted = true
      await link.unread(delay(1000 * slow_seconds))
      return message
    },
    async down({ message }) {
      if (isSilent) await delay(1000 * slow_seconds)
      isSilent = false
      return [message]
    },
  }
}
