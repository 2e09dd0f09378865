import { ConfigError } from '../../config.js'
import { ServiceError } from '../../errors.js'
import { Turns } from '../../keep/turns.js'
import { attentionDifference, parseAttentions } from '../../optimizer/attention.js'
import { findingDifference, parsingParameters } from '../../optimizer/parameter.js'
import type { Presets } from '../../optimizer/preset.js'
import { declarationOf, parseGroups } from '../../run/declaration.js'
import { inSlices } from '../../run/slices.js'
import type { OpenFrame, ParameterDeclaration } from '../../wire/frame.js'
import { type CommitLog, MemoryLog } from '../commit-log.js'
import { shardName } from '../names.js'
import type { Calls } from '../peers/calls.js'
import type { Peers } from '../peers/peers.js'
import { mostShards, placeShards } from '../placement.js'
import { Head, type HeadParts, type Placement } from './head.js'
import type { StoredLog, WholeCheckpoint, WholeRecord, WholeStore } from './whole-store.js'

export type WholesMeans = {
  peers: Peers
  calls: Calls
  presets: Presets
  /** Over so many shards a run is spread whose client leaves the number to the service. */
  shards: number
  /** The most wholes that a process is the head of. */
  most: number
  /** Undefined where nothing is kept. */
  files: WholeStore | undefined
  /** Whether there is an ordinary run of this name here. */
  hasRun: (name: string) => boolean
}

/** A whole that was opened, and what its control connection is told. */
export type OpenedWhole = { head: Head; placement: Placement; resumed: boolean }

/** The wholes of which this process is the head. */
export class Wholes {
  readonly #means: WholesMeans
  readonly #heads = new Map<string, Head>()
  /** Why a whole in the data folder cannot be read. */
  readonly #unreadable = new Map<string, ServiceError>()
  readonly #logs = new Map<string, StoredLog>()
  readonly #turns = new Turns()

  constructor(means: WholesMeans) {
    this.#means = means
  }

  /**
   * Brings back what is in the data folder. Throws ConfigError for a whole whose processes are not those of `peers`.
   */
  async restore(): Promise<void> {
    const { files } = this.#means
    // What every process sees each begins that is its head.
    if (!files) return
    for (const name of await files.names()) {
      if (files.isShared && this.#means.peers.headOf(name) !== this.#means.peers.self) continue
      try {
        const { record, checkpoints, log } = await files.read(name)
        this.#logs.set(name, log)
        this.#checkPeers(record)
        this.#heads.set(name, await this.#begin(record, { checkpoints, log }))
      } catch (error) {
        if (!(error instanceof ServiceError)) {
          await this.close()
          throw error
        }
        this.#unreadable.set(name, error)
      }
    }
  }

  has(name: string): boolean {
    return this.#heads.has(name) || this.#unreadable.has(name)
  }

  list(): Head[] {
    return [...this.#heads.values()]
  }

  /** Throws RUN_NOT_FOUND, and CHECKPOINT_UNREADABLE. */
  get(name: string): Head {
    const head = this.#heads.get(name)
    if (head) return head
    throw (
      this.#unreadable.get(name) ??
      new ServiceError('RUN_NOT_FOUND', `this process is the head of no run '${name}' over several processes`)
    )
  }

  /** Opens a whole, or makes one. Undefined: the run is one of this process alone. */
  open(frame: OpenFrame): Promise<OpenedWhole | undefined> {
    return this.#turns.take(frame.run, () => this.#open(frame))
  }

  /** Deletes a whole and its shards. Nothing of it is forgotten here before every process has deleted its own. */
  delete(name: string): Promise<void> {
    return this.#turns.take(name, async () => {
      const { calls, files } = this.#means
      const head = this.get(name)
      const message = `run '${name}' was deleted; where a process did not answer, delete it again`
      head.close(new ServiceError('RUN_NOT_FOUND', message, { close: 1008 }))
      await Promise.all(head.record.shards.map(({ peer }, index) => calls.remove(peer, shardName(name, index))))
      await this.#logs.get(name)?.close()
      await files?.remove(name)
      this.#logs.delete(name)
      this.#heads.delete(name)
    })
  }

  async close(): Promise<void> {
    for (const head of this.list()) head.close(new ServiceError('DRAINING', 'the service shuts down', { close: 1012 }))
    for (const log of this.#logs.values()) await log.close()
  }

  async #open(frame: OpenFrame): Promise<OpenedWhole | undefined> {
    const { run, mode, checkpoint, shards } = frame
    if (!this.has(run)) return this.#create(frame)
    const head = this.get(run)
    if (shards === undefined) throw unfollowed(frame, `is spread over ${head.record.shards.length} processes`)
    refuseUnbuilt(frame)
    const joins = frame.member !== undefined && head.step === 0
    if (mode === 'create' && !joins) throw new ServiceError('RUN_EXISTS', `run '${run}' exists`)
    await this.#checkSame(head, frame)
    if (checkpoint === undefined) return { head, placement: head.placement(), resumed: true }
    if (mode !== 'resume')
      throw new ServiceError('PARAMETER_INVALID', `checkpoint '${checkpoint}' goes with mode resume, mode is ${mode}`)
    return { head, placement: head.placement(await head.goBack(checkpoint)), resumed: true }
  }

  async #create(frame: OpenFrame): Promise<OpenedWhole | undefined> {
    const { run, mode, shards } = frame
    const wanted = shards === undefined ? 1 : shards || this.#means.shards
    if (wanted === 1 || mode === 'resume' || this.#means.hasRun(run)) return undefined
    refuseUnbuilt(frame)
    const { most } = this.#means
    if (this.#heads.size >= most) {
      const message = `this process is the head of ${most} runs over several processes, which is the most: delete one, or raise --max-runs`
      throw new ServiceError('OVER_CAPACITY', message)
    }
    const { parameters, attentions } = await inSlices(declarationOf(frame, this.#means.presets))
    const count = shards ? wanted : Math.min(wanted, mostShards(parameters, attentions))
    const parts = placeShards(parameters, attentions, count)
    if (parts.length === 1) return undefined
    const peers = this.#means.peers.inOrder(run)
    const record = recordOf(
      frame,
      parts.map((indices, index) => ({ peer: peers[index % peers.length], parameters: indices })),
    )
    const head = await this.#beginNew(record)
    return { head, placement: head.placement(), resumed: false }
  }

  /** Begins a whole that was not there, or leaves nothing of it: a name that is taken by nothing cannot be opened. */
  async #beginNew(record: WholeRecord): Promise<Head> {
    const { run } = record
    const { files } = this.#means
    const stored = await files?.create(record)
    try {
      const head = await this.#begin(record, stored ?? { checkpoints: [], log: new MemoryLog() })
      if (stored) this.#logs.set(run, stored.log)
      this.#heads.set(run, head)
      return head
    } catch (error) {
      await stored?.log.close()
      // Where that fails too its name is taken until the next start.
      /* c8 ignore next -- a store that has just taken the whole lets it be removed */
      await files?.remove(run).catch(() => undefined)
      throw error
    }
  }

  async #begin(
    record: WholeRecord,
    { checkpoints, log }: { checkpoints: readonly WholeCheckpoint[]; log: CommitLog },
  ): Promise<Head> {
    const { peers, calls, presets, files } = this.#means
    const groups = parseGroups(record.groups, presets)
    const parameters = await inSlices(parsingParameters(record.parameters, groups))
    const attentions = parseAttentions(record.attentions, parameters)
    const keep: HeadParts['keep'] = files && ((all) => files.keepCheckpoints(record.run, all))
    return Head.begin({ record, parameters, attentions, log, checkpoints, self: peers.self, calls, keep })
  }

  /** Groups are compared by the shards: which of their values may change is theirs to know. */
  async #checkSame(head: Head, { parameters, attentions, groups }: OpenFrame): Promise<void> {
    const { presets } = this.#means
    const mismatch = (difference: string) => new ServiceError('RUN_MISMATCH', `run '${head.run}': ${difference}`)
    if (parameters) {
      const given = await inSlices(parsingParameters(parameters, parseGroups(groups ?? head.record.groups, presets)))
      const difference = await inSlices(findingDifference(head.parameters, given))
      if (difference) throw mismatch(difference)
    }
    if (!attentions) return
    const difference = attentionDifference(head.attentions, parseAttentions(attentions, head.parameters))
    if (difference) throw mismatch(difference)
  }

  #checkPeers({ run, shards }: WholeRecord): void {
    const { peers } = this.#means
    const lost = shards.find(({ peer }) => !peers.has(peer))
    if (peers.headOf(run) === peers.self && lost === undefined) return
    const why = lost ? `a shard at ${lost.peer}` : `its head here, and by these peers that is ${peers.headOf(run)}`
    throw new ConfigError(`run '${run}' of the data folder has ${why}: start with the peers that it was made with`)
  }
}

/** What of a run over several processes is not built is refused: nothing may be left out in silence. */
function refuseUnbuilt({ run, member, quorum, from }: OpenFrame): void {
  const asked = [
    ...((member?.replicas ?? 1) > 1 ? ['replicas'] : []),
    ...(quorum ? ['a quorum'] : []),
    ...(from ? ['a run that it begins with (from)'] : []),
  ]
  if (asked.length === 0) return
  const message = `run '${run}' is spread over several processes, which cannot have ${asked.join(', ')}: ask for one shard`
  throw new ServiceError('PARAMETER_INVALID', message)
}

/** For a client that would not know what a frame `moved` or `placed` is. */
export function unfollowed({ run }: OpenFrame, where: string): ServiceError {
  const remedy = 'open it with a client that follows shards (the key `shards` of open)'
  return new ServiceError('PARAMETER_INVALID', `run '${run}' ${where}: ${remedy}`)
}

function recordOf(
  { run, groups = [], parameters = [], attentions = [] }: OpenFrame,
  shards: WholeRecord['shards'],
): WholeRecord {
  const declared = parameters.map(({ ranges: _, ...parameter }): ParameterDeclaration => parameter)
  return { run, created_at: new Date().toISOString(), groups, parameters: declared, attentions, shards }
}

/* c8 ignore next 3 -- there are names where there are files */
