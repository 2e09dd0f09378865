import type { ErrorCode } from '../../errors.js'
import type { ClientFrame, ServerFrame } from '../../wire/frame.js'
import type { Check } from './checks.js'
import type { Course } from './course.js'
import type { Link } from './link.js'

/** A message on its way, and whose it is. */
export type Passing<F> = { frame: F; message: Buffer; link: Link; course: Course }

/** What happens to the client in one step. It has come through once it begins the next one. */
export type Scene = {
  readonly check: Check
  /** Whether it has done to the client what it is for. */
  acted: boolean
  /** Errors of the service that it provokes. */
  readonly pardons: readonly ErrorCode[]
  /** What goes on to the service in place of a message of the client; undefined for nothing. */
  up?(passing: Passing<ClientFrame>): Promise<Buffer | undefined>
  /** What the client is told in place of a message of the service. */
  down?(passing: Passing<ServerFrame>): Promise<readonly Buffer[]>
  /** What is wrong although the client has come through, in words. */
  lacks?(): string | undefined
  /** Whether the client may end here. */
  mayEnd?(): boolean
}

/** What scenes need of the service, and how long a slow one takes. */
export type Props = {
  slow_seconds: number
  /** Has the service refuse the next upgrade with DRAINING. */
  refuseUpgrade(): void
  deleteRun(name: string): Promise<void>
  fail(check: Check, fault: string): void
}

/** A scene that has done nothing yet. */
export function scene(check: Check, pardons: readonly ErrorCode[] = []) {
  return { check, pardons, acted: false }
}
