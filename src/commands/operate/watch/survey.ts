import type { components } from '../../../http/openapi.js'
import { AnswerError, getText, type ServiceAddress } from '../../rest.js'

type Schemas = components['schemas']

/** What a service says of itself at one moment. */
export type Survey = {
  /** By the clock of the service, in milliseconds since 1970, to the second. */
  readonly now: number
  /** Why it accepts no steps; undefined where it does. */
  readonly unready: string | undefined
  readonly capabilities: Schemas['Capabilities']
  readonly runs: readonly RunRow[]
  /** Runs on the disk that wait to be restored or cannot be. */
  readonly stored: readonly Schemas['StoredRun'][]
  /** Samples of `/metrics` by their names and labels; undefined where the key is not for all runs. */
  readonly samples: ReadonlyMap<string, number> | undefined
}

/** A run, and what follows from what is said of it. */
export type RunRow = Schemas['RunSummary'] & {
  readonly status: 'training' | 'waiting' | 'no trainer' | 'on disk'
  /** Steps a second while it is training, else 0. */
  readonly step_rate: number
  /** Seconds since its last step; undefined where this process of the service has finished none. */
  readonly last_step_seconds: number | undefined
}

/** A run whose last step is older than so many of its steps, and than so many seconds, is not training. */
const STILL_STEPS = 5
const STILL_SECONDS = 5
const FORBIDDEN = 403
const UNAVAILABLE = 503

/** Asks a service all of it. Throws ConfigError as `getText`. */
export async function survey(service: ServiceAddress): Promise<Survey> {
  const [unready, capabilities, list, samples] = await Promise.all([
    reasonOf(service),
    getText(service, '/v1/capabilities'),
    getText(service, '/v1/runs'),
    samplesOf(service),
  ])
  const { runs, stored }: { runs: Schemas['RunSummary'][]; stored: Schemas['StoredRun'][] } = JSON.parse(list.text)
  return {
    ...{ now: list.date, unready, capabilities: JSON.parse(capabilities.text), stored, samples },
    runs: runs.map((run) => rowOf(run, list.date)),
  }
}

/** The newest receipt of a run that has finished a step; undefined where it has gone meanwhile. */
export async function newestReceipt(
  service: ServiceAddress,
  { name, step }: Pick<RunRow, 'name' | 'step'>,
): Promise<Schemas['Receipt'] | undefined> {
  try {
    const { text } = await getText(service, `/v1/runs/${encodeURIComponent(name)}/receipts?after=${step - 1}`)
    const { receipts }: { receipts: Schemas['Receipt'][] } = JSON.parse(text)
    return receipts.at(-1)
    /* c8 ignore start -- the run may be deleted in between, and the service may end */
  } catch (error) {
    if (error instanceof AnswerError) return undefined
    throw error
  }
  /* c8 ignore stop */
}

function rowOf(run: Schemas['RunSummary'], now: number): RunRow {
  const { connected, last_step_at, step_seconds = 0 } = run
  // The clock of the answer is cut to the second: a step may seem to come after it.
  const age = last_step_at === undefined ? undefined : Math.max(0, (now - Date.parse(last_step_at)) / 1000)
  const isTraining = connected && age !== undefined && age <= Math.max(STILL_SECONDS, STILL_STEPS * step_seconds)
  // The mean over the newest steps says nothing of the one in progress, which takes as long as the last one is past.
  const step_rate = isTraining ? 1 / Math.max(step_seconds, age) : 0
  return { ...run, status: statusOf(run, isTraining), step_rate, last_step_seconds: age }
}

function statusOf({ in_memory, connected }: Schemas['RunSummary'], isTraining: boolean): RunRow['status'] {
  if (!in_memory) return 'on disk'
  if (!connected) return 'no trainer'
  return isTraining ? 'training' : 'waiting'
}

async function reasonOf(service: ServiceAddress): Promise<string | undefined> {
  try {
    await getText(service, '/readyz')
    return undefined
  } catch (error) {
    if (error instanceof AnswerError && error.status === UNAVAILABLE) return error.detail
    throw error
  }
}

async function samplesOf(service: ServiceAddress): Promise<Map<string, number> | undefined> {
  try {
    const { text } = await getText(service, '/metrics')
    return new Map([...text.matchAll(SAMPLE)].map(([, name, value]) => [name, Number(value)]))
  } catch (error) {
    if (error instanceof AnswerError && error.status === FORBIDDEN) return undefined
    throw error
  }
}

const SAMPLE = /^(\w+(?:\{[^}]*\})?) (\S+)$/gm
