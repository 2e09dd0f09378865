import { errorText } from '../../../errors.js'

/** `ok`; `warning`: a start succeeds, or fails only because a service runs already; `error`: a start or a run fails. */
export type State = 'ok' | 'warning' | 'error'

/** What was found out about one thing, and what to do about it where it is not as it should be. */
export type Finding = {
  readonly check: string
  readonly state: State
  readonly found: string
  readonly remedy?: string
}

export function ok(check: string, found: string): Finding {
  return { check, state: 'ok', found }
}

export function warning(check: string, found: string, remedy: string): Finding {
  return { check, state: 'warning', found, remedy }
}

export function failure(check: string, found: string, remedy: string): Finding {
  return { check, state: 'error', found, remedy }
}

/** A setting whose thing a running service has: no other one can take it, and none should. */
export function taken(check: string, found: string, flag: string): Finding {
  return warning(check, found, `to be expected beside a running service; a second one takes another ${flag}`)
}

/** What `work` finds. Where it throws, such as the ConfigError that a start would end with, there is this remedy. */
export async function finding(
  check: string,
  remedy: string,
  work: () => Finding | Finding[] | Promise<Finding | Finding[]>,
): Promise<Finding[]> {
  try {
    return [await work()].flat()
  } catch (error) {
    return [failure(check, errorText(error), remedy)]
  }
}
