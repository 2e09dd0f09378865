import type { Principal } from '../access/principal.js'
import type { Cluster, Pass, Way } from '../cluster/cluster.js'
import { type Config, VERSION } from '../config.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import type { Log } from '../keep/keeper.js'
import type { Opened, Runs } from '../keep/runs.js'
import type { Connection } from '../run/members/member.js'
import type { OpenFrame } from '../wire/frame.js'
import { checkOpening } from './permission.js'

export type OpeningMeans = {
  runs: Runs
  principal: Principal
  cluster: Cluster | undefined
  log: Log
}

/** What an `open` has come to: a run of this process, or as the cluster says. */
export type Opening = Exclude<Way, { kind: 'run' }> | { readonly kind: 'run'; readonly opened: Opened }

/** Opens what a frame asks for. Throws whatever it is refused with. */
export async function openFrame(
  frame: OpenFrame,
  connection: Connection,
  { runs, principal, cluster, log }: OpeningMeans,
): Promise<Opening> {
  checkOpening(principal, runs, frame)
  if (!cluster) refuseShards(frame)
  const way = (await cluster?.wayOf(frame)) ?? { kind: 'run' }
  if (way.kind !== 'run') return way
  const isNew = !runs.has(frame.run)
  const opened = await runs.open(frame, connection, principal)
  if (way.pass) await admit(way.pass, opened, () => (isNew ? runs.delete(frame.run) : undefined))
  const { name, epoch, step } = opened.run
  const { resumed } = opened
  log.info({ event: 'run_opened', run: name, epoch, step, resumed, client: frame.client, key: principal.name })
  return { kind: 'run', opened }
}

/** A shard that was made by an `open` which is then refused is taken back, unless others have it already. */
async function admit(pass: Pass, { run, member }: Opened, takeBack: () => Promise<void> | undefined): Promise<void> {
  try {
    pass.admit(run, member)
  } catch (error) {
    run.intake.detach(member)
    if (!run.connected) await takeBack()
    throw error
  }
}

/** Throws PARAMETER_INVALID for what only a process with peers can open: several shards, and a shard itself. */
export function refuseShards({ run, shards = 1, shard }: OpenFrame): void {
  const remedy = 'this service has no peers (--peers), and spreads no run over several processes'
  if (shards > 1) throw new ServiceError('PARAMETER_INVALID', `run '${run}' asks for ${shards} shards: ${remedy}`)
  if (shard !== undefined || run.includes('~'))
    throw new ServiceError('PARAMETER_INVALID', `'${run}' is a shard of a run: ${remedy}`)
}

/** What an answer to `open` says of the service. */
export function aboutService({ config, device }: { config: Config; device: Device }) {
  const { chunk_bytes, staging_bytes, max_parameters, idle_seconds } = config
  const server = { name: 'muond', version: VERSION, device: device.backend.name, onnxruntime: device.backend.version }
  return { limits: { chunk_bytes, staging_bytes, max_parameters, idle_seconds }, server }
}
