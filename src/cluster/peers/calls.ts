import { causeText, ERRORS, type ErrorCode, ServiceError } from '../../errors.js'
import type { Vote } from '../vote.js'
import { type VoteBody, voteBody } from './vote-text.js'

/** A whole as its head tells of it. */
export type WholeBody = {
  run: string
  head: string
  generation: number
  step: number
  digest: string
  created_at: string
  shards: {
    run: string
    peer: string
    parameters: number[][]
    declared: string
    state_bytes: number
    digest: string
    /** The one that it may be opened at: the whole has gone back to it, and taken no step since. */
    checkpoint?: string
    voted: boolean
  }[]
}

/** A checkpoint of a shard that its process has taken. */
export type TakenCheckpoint = { checkpoint: string; step: number; digest: string; bytes: number }

/** Longer than a process waits for the step in progress before it takes a checkpoint, and for the disk. */
const MOST_MS = 120_000

/** What one process asks of another, with the key of the cluster. All of it throws PEER_FAILED where nobody answers. */
export class Calls {
  readonly #key: string

  constructor(key: string) {
    this.#key = key
  }

  /** Throws RUN_NOT_FOUND where the process is not the head of such a whole. */
  async readWhole(head: string, run: string): Promise<WholeBody> {
    const response = await this.#ask(head, `/v1/runs/${run}/votes`)
    return (await bodyOf(head, response)) as WholeBody
  }

  /** Throws what the head refuses a vote with. */
  async vote(head: string, run: string, vote: Vote, signal: AbortSignal): Promise<void> {
    const body: VoteBody = voteBody(vote)
    await this.#ask(head, `/v1/runs/${run}/votes`, { method: 'POST', body, signal })
  }

  async checkpoint(peer: string, shard: string, tag: string | undefined): Promise<TakenCheckpoint> {
    const body = tag === undefined ? {} : { tag }
    const response = await this.#ask(peer, `/v1/runs/${shard}/checkpoints`, { method: 'POST', body })
    return (await bodyOf(peer, response)) as TakenCheckpoint
  }

  /**
   * Whether a process has a checkpoint of a shard. True where the newest one of that shard cannot be read: going back
   * is the way on then, and nobody can say what else there is.
   */
  async hasCheckpoint(peer: string, shard: string, checkpoint: string): Promise<boolean> {
    const refusal = await this.#refusal(peer, `/v1/runs/${shard}/checkpoints/${checkpoint}`)
    if (refusal?.code === 'NOT_FOUND' || refusal?.code === 'RUN_NOT_FOUND') return false
    if (refusal && refusal.code !== 'CHECKPOINT_UNREADABLE') throw refusal
    return true
  }

  /** Deletes a shard, if it is there. */
  async remove(peer: string, shard: string): Promise<void> {
    const refusal = await this.#refusal(peer, `/v1/runs/${shard}`, { method: 'DELETE' })
    if (refusal && refusal.code !== 'RUN_NOT_FOUND') throw refusal
  }

  /** What a request is refused with, if it is. */
  async #refusal(peer: string, path: string, init: { method?: string } = {}): Promise<ServiceError | undefined> {
    try {
      await this.#ask(peer, path, init)
      return undefined
    } catch (error) {
      /* c8 ignore next -- a bug of ours is told as one */
      if (!(error instanceof ServiceError)) throw error
      return error
    }
  }

  async #ask(
    peer: string,
    path: string,
    { method = 'GET', body, signal }: { method?: string; body?: object; signal?: AbortSignal } = {},
  ): Promise<Response> {
    const deadline = AbortSignal.timeout(MOST_MS)
    const headers = { authorization: `Bearer ${this.#key}`, ...(body && { 'content-type': 'application/json' }) }
    const response = await fetch(peer + path, {
      ...{ method, headers, redirect: 'error', signal: signal ? AbortSignal.any([signal, deadline]) : deadline },
      ...(body && { body: JSON.stringify(body) }),
    }).catch((error) => {
      const reason = causeText(error)
      throw new ServiceError('PEER_FAILED', `the process ${peer} of the cluster does not answer: ${reason}`)
    })
    if (response.ok) return response
    throw await refusalOf(peer, response)
  }
}

/** Throws PEER_FAILED for an answer that is cut off. */
async function bodyOf(peer: string, response: Response): Promise<unknown> {
  try {
    return await response.json()
  } catch (error) {
    const reason = causeText(error)
    throw new ServiceError('PEER_FAILED', `an answer of the process ${peer} of the cluster was cut off: ${reason}`)
  }
}

/** What a process has refused a request with; a key that it does not take is a mistake of the operator's. */
async function refusalOf(peer: string, response: Response): Promise<ServiceError> {
  const { status } = response
  const problem: unknown = await response.json().catch(() => undefined)
  const [code, detail] = ['code', 'detail'].map((key) => Reflect.get(Object(problem), key))
  if (!isErrorCode(code) || typeof detail !== 'string')
    return new ServiceError('PEER_FAILED', `the process ${peer} of the cluster answers with HTTP status ${status}`)
  if (code !== 'UNAUTHORIZED' && code !== 'FORBIDDEN') return new ServiceError(code, detail, { status })
  const remedy = 'every process of peers needs the same key of the cluster'
  return new ServiceError('PEER_FAILED', `the process ${peer} refuses this one: ${detail}; ${remedy}`)
}

function isErrorCode(code: unknown): code is ErrorCode {
  return typeof code === 'string' && Object.hasOwn(ERRORS, code)
}
