import { ERRORS } from '../../errors.js'
import { encodeFrame } from '../../wire/codec.js'
import type { ServerFrame } from '../../wire/frame.js'
import { type Passing, type Props, type Scene, scene } from './scene.js'

/** What happens to a service or on the way to it, and what a client makes of it. */

/** How long a refused client is told to wait; clocks may differ by a little. */
const RETRY_AFTER_SECONDS = 0.5
const EARLY_SECONDS = 0.05
const OVERLOADED = 1013
const RESTART = 1012

/** The connection is lost in the middle of an update, and the service has not noticed. */
export function reconnect({ fail }: Props): Scene {
  let updates = 0
  return {
    ...scene('reconnect', ['RUN_BUSY']),
    async down({ frame, message, link, course }) {
      if (this.acted || frame.type !== 'update' || !frame.data) return [message]
      if (frame.scale !== undefined) updates += 1
      // Where there are several parameters the client has one update, which it must not apply a second time.
      if (updates < Math.min(2, course.parameters)) return [message]
      this.acted = true
      const unit = course.unitOf(frame.parameter)
      const half = unit * Math.floor(frame.data.length / unit / 2)
      if (half > 0) link.tell(encodeFrame({ ...frame, data: frame.data.subarray(0, half) }))
      link.cut()
      return []
    },
    async up({ frame, message }) {
      if (this.acted && frame.type === 'open' && !frame.takeover)
        fail('reconnect', 'open without takeover after a lost connection: the service may not have noticed the loss')
      return message
    },
  }
}

/** The connection is lost when the service has finished the step, and the client does not know. */
export function receipt(): Scene {
  return {
    ...scene('receipt'),
    async down({ frame, message, link, course }) {
      if (this.acted || frame.type !== 'receipt') return [message]
      this.acted = true
      link.cut()
      course.finish()
      return []
    },
  }
}

export function overloaded({ fail }: Props): Scene {
  const cut = cutter()
  let toldAt: number | undefined
  let isBack = false
  return {
    ...scene('overloaded', ['RUN_BUSY']),
    down: async (passing) => cut(passing),
    async up({ frame, message, link }) {
      if (frame.type !== 'open' || isBack || !link.isReturn) return message
      const now = performance.now()
      if (toldAt === undefined) {
        toldAt = now
        this.acted = true
        link.refuse(OVERLOADED_FRAME, OVERLOADED)
        return undefined
      }
      isBack = true
      const waited = (now - toldAt) / 1000
      if (waited < RETRY_AFTER_SECONDS - EARLY_SECONDS)
        fail('overloaded', `opened again after ${waited.toFixed(3)} s, retry_after_seconds was ${RETRY_AFTER_SECONDS}`)
      return message
    },
  }
}

const OVERLOADED_FRAME = encodeFrame({
  ...{ type: 'error', code: 'OVERLOADED', message: 'the service has too much to do' },
  ...{ status: ERRORS.OVERLOADED.status, retryable: ERRORS.OVERLOADED.retryable },
  retry_after_seconds: RETRY_AFTER_SECONDS,
})

export function refused({ refuseUpgrade }: Props): Scene {
  const cut = cutter()
  return {
    ...scene('refused', ['RUN_BUSY']),
    async down(passing) {
      return cut(passing, () => {
        this.acted = true
        refuseUpgrade()
      })
    },
  }
}

/** Cuts the connection at the first update, once. */
function cutter(): (passing: Passing<ServerFrame>, then?: () => void) => readonly Buffer[] {
  let isCut = false
  return ({ frame, message, link }, then) => {
    if (isCut || frame.type !== 'update') return [message]
    isCut = true
    then?.()
    link.cut()
    return []
  }
}

/** The service says that it shuts down, and does when the step has ended. */
export function draining(): Scene {
  return {
    ...scene('draining'),
    async down({ frame, message, link }) {
      const notice = encodeFrame({ type: 'draining', deadline_seconds: 30 })
      const isFirst = !this.acted
      this.acted = true
      if (frame.type !== 'receipt') return isFirst ? [notice, message] : [message]
      link.tell(message)
      link.close(RESTART, 'the service shuts down')
      return []
    },
  }
}

/** The first gradient has a NaN by the time it reaches the service. */
export function notFinite(): Scene {
  let isTold = false
  return {
    // Whoever sends a whole step before it reads has sent `end` too.
    ...scene('not-finite', ['GRADIENT_NOT_FINITE', 'STEP_INCOMPLETE']),
    async up({ frame, message }) {
      if (this.acted || frame.type !== 'gradient') return message
      this.acted = true
      const start = frame.data.byteOffset - message.byteOffset
      // All bits set are NaN in float32, bfloat16 and float16, and in the scale of a block.
      return Buffer.from(message).fill(0xff, start, start + Math.min(4, frame.data.length))
    },
    async down({ frame, message }) {
      if (frame.type === 'error') isTold ||= frame.code === 'GRADIENT_NOT_FINITE'
      else if (frame.type === 'receipt') isTold = false
      return [message]
    },
    mayEnd: () => isTold,
  }
}

/** The service was started anew without its state. */
export function lostRun({ fail, deleteRun }: Props): Scene {
  let isBack = false
  return {
    ...scene('lost-run', ['RUN_BUSY', 'RUN_NOT_FOUND', 'PARAMETER_INVALID']),
    async down({ frame, message, link, course }) {
      if (this.acted || frame.type !== 'update') return [message]
      this.acted = true
      link.cut()
      await deleteRun(course.name)
      return []
    },
    async up({ frame, message, course }) {
      if (!this.acted) return message
      isBack = true
      if (frame.type === 'gradient' || frame.type === 'end')
        fail('lost-run', `the run is new, and the client goes on with weights of step ${course.step}`)
      return message
    },
    mayEnd: () => isBack,
  }
}
