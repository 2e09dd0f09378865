import { ConfigError } from '../config.js'

type ErrorClass = abstract new (message: string) => Error

/**
 * Runs `work`. An error of one of `classes`, which the person at the terminal can do something about, is thrown as
 * ConfigError: one line without a stack. Any other error is thrown as it is.
 */
export async function withPlainErrors<T>(classes: readonly ErrorClass[], work: () => Promise<T>): Promise<T> {
  try {
    return await work()
  } catch (error) {
    if (error instanceof Error && classes.some((known) => error instanceof known)) throw new ConfigError(error.message)
    throw error
  }
}
