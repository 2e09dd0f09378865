import { ServiceError } from '../errors.js'
import { type DecodeLimits, decodeClientFrame, encodeFrame } from './codec.js'
import type { ClientFrame } from './frame.js'

/** As deep as a message of the stream may be. */
const MOST_LEVELS = 8

/**
 * A frame that was written as JSON, held against all that holds for one of the stream. JSON does not tell 5.0 from 5:
 * a whole number counts something where something is counted.
 * @throws ServiceError as `decodeClientFrame`
 */
export function frameOfJson<T extends 'open' | 'step'>(
  type: T,
  keys: object,
  limits: DecodeLimits,
): Extract<ClientFrame, { type: T }> {
  if (isDeeper(keys, MOST_LEVELS))
    throw new ServiceError('FRAME_MALFORMED', `${type} is nested more than ${MOST_LEVELS} levels deep`)
  // Whatever the keys hold is written as it stands: reading it again finds what is wrong.
  const given = { ...keys, type } as Extract<ClientFrame, { type: T }>
  return decodeClientFrame(encodeFrame(given), limits) as Extract<ClientFrame, { type: T }>
}

function isDeeper(value: unknown, levels: number): boolean {
  if (typeof value !== 'object' || value === null) return false
  return levels === 0 || Object.values(value).some((inner) => isDeeper(inner, levels - 1))
}
