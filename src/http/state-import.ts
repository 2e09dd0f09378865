import type { IncomingHttpHeaders } from 'node:http'
import type { Readable } from 'node:stream'
import type { Config } from '../config.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import { BodyTooLargeError, receiveState } from '../keep/importing/receive-state.js'
import type { Log } from '../keep/keeper.js'
import type { Runs } from '../keep/runs.js'
import type { ImportedState } from '../run/imported-state.js'
import type { Run } from '../run/run.js'
import { SafetensorsError } from '../store/safetensors.js'
import { betweenSteps } from './checkpoints.js'
import type { BodyMeter } from './metered.js'
import type { components, operations } from './openapi.js'
import { paced } from './pace.js'

type Query = Required<NonNullable<operations['putState']['parameters']['query']>>
type Request = { query: Query; headers: IncomingHttpHeaders; body: Readable; log: Log; meter: BodyMeter }

/**
 * Imports a safetensors body into a run between two steps, all of it or nothing. Throws REQUEST_INVALID for a body
 * that is no safetensors file or is cut off, 413 for one that is too long, and what the run refuses as STATE_INVALID.
 */
export async function importState(
  { runs, device, config }: { runs: Runs; device: Device; config: Config },
  run: Run,
  { query: { partial, momentum_form }, headers, body, log, meter }: Request,
): Promise<components['schemas']['Imported']> {
  const started = performance.now()
  const length = headers['content-length']
  const options = {
    partial,
    ...(momentum_form === 'stated' ? {} : { momentum_form }),
    ...(length === undefined ? {} : { bytes: Number(length) }),
    body: meter.pass(paced(body, config)),
  }
  return runs.import(run, async () => {
    const incoming = await receiveState(device, run, options).catch((error) => {
      throw refusal(error)
    })
    try {
      const taken = await betweenSteps(runs, run, () => runs.takeOver(run, incoming))
      const { step, digest } = taken
      const seconds = (performance.now() - started) / 1000
      log.info({ event: 'state_imported', run: run.name, step, digest, seconds })
      return { ...taken, ...counts(incoming) }
    } finally {
      incoming.dispose()
    }
  })
}

function counts({ places }: ImportedState): { parameters: number } {
  return { parameters: places.filter((place) => place !== undefined).length }
}

/** What is wrong with a body of safetensors is its sender's to know. */
export function refusal(error: unknown): unknown {
  if (error instanceof SafetensorsError) return new ServiceError('REQUEST_INVALID', error.message)
  if (error instanceof BodyTooLargeError) return Object.assign(error, { statusCode: 413 })
  if (error instanceof Error && 'code' in error && error.code === 'ECONNRESET')
    return new ServiceError('REQUEST_INVALID', 'the connection was lost before the end of the body')
  return error
}
