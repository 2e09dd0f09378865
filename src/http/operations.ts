import { Readable } from 'node:stream'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { WIRE_DTYPES } from '../../kernels/dtype.js'
import type { Principal } from '../access/principal.js'
import type { Cluster } from '../cluster/cluster.js'
import { type Config, VERSION } from '../config.js'
import type { Device } from '../device/device.js'
import { ServiceError } from '../errors.js'
import type { IdleRun } from '../keep/idle.js'
import { checkTag } from '../keep/keeper.js'
import type { Runs } from '../keep/runs.js'
import type { Metrics } from '../metrics.js'
import { explain } from '../optimizer/explanation.js'
import { groupOf } from '../optimizer/hyperparameters.js'
import { describe } from '../optimizer/parameter.js'
import type { Preset, Presets } from '../optimizer/preset.js'
import { HYPERPARAMETERS } from '../optimizer/table.js'
import { memberId } from '../run/members/member.js'
import type { Run } from '../run/run.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import type { DataFolder } from '../store/data-folder.js'
import type { RunFolder } from '../store/run-folder.js'
import { PROTOCOL } from '../wire/frame.js'
import { principalIn } from './auth.js'
import { betweenSteps, findCheckpoint } from './checkpoints.js'
import { refuseShard, type ShardOperation, shardHandlers, shardOf, wholesBody } from './cluster/shards.js'
import { type Contract, readAsyncapi } from './contract.js'
import { type Events, receiptBody } from './events.js'
import { bodyMeterIn } from './metered.js'
import type { components, operations } from './openapi.js'
import type { StateReaders } from './readers.js'
import { runStateBody, stateBody, stateNorms } from './state.js'
import { importState } from './state-import.js'
import { openRun } from './steps/open-run.js'
import type { PlainSteps } from './steps/plain-steps.js'

export type Services = {
  config: Config
  device: Device
  runs: Runs
  /** Undefined without the setting `peers`. */
  cluster: Cluster | undefined
  presets: Presets
  metrics: Metrics
  events: Events
  readers: StateReaders
  steps: PlainSteps
  contract: Contract
  /** Where runs are kept; undefined where they are not. */
  data: DataFolder | undefined
}

type Schemas = components['schemas']
type ParametersOf<O, In extends string> = O extends { parameters: { [K in In]?: infer P } }
  ? AllOf<NonNullable<P>>
  : never
type AllOf<P> = [P] extends [never] ? unknown : Required<P>
/** A request as validation leaves it. Every query parameter of the contract has a default, so none is undefined. */
type RequestOf<O> = FastifyRequest & {
  params: ParametersOf<O, 'path'>
  query: ParametersOf<O, 'query'>
  body: BodyOf<O>
}
type BodyOf<O> = O extends { requestBody?: { content: { 'application/json': infer Body } } }
  ? Body | undefined
  : unknown
type AnswerOf<O> = O extends { responses: { 200: { content: { 'application/json': infer Body } } } }
  ? Body
  : FastifyReply
type Handler<O> = (request: RequestOf<O>, reply: FastifyReply) => AnswerOf<O> | Promise<AnswerOf<O>>
/**
 * A handler of any operation. Its type is that of a method, whose parameters TypeScript compares loosely: validation
 * has made the request fit the handler.
 */
export type AnyHandler = { handle(request: FastifyRequest, reply: FastifyReply): unknown }['handle']

/** Operations whose pages are served from files, with what those need. */
export type Page = 'getDocs' | 'getUi'

/** One handler per operationId of openapi.yaml: a missing one does not compile. */
export type Handlers = { readonly [Id in Exclude<keyof operations, Page>]: Handler<operations[Id]> }

/**
 * The handlers of the control plane. They throw ServiceError; app.ts makes routes of them and problem documents of
 * errors.
 */
export function createHandlers(services: Services): Handlers {
  return {
    ...serviceHandlers(services),
    ...runHandlers(services),
    ...checkpointHandlers(services),
    ...stepHandlers(services),
    ...shardHandlers(services),
    openStream: (_request, reply) => {
      reply.header('upgrade', 'websocket').header('connection', 'upgrade')
      throw Object.assign(new Error('this is a WebSocket: the request needs `Upgrade: websocket`'), { statusCode: 426 })
    },
  }
}

type ServiceOperation =
  | 'getRoot'
  | 'getLivez'
  | 'getReadyz'
  | 'getMetrics'
  | 'getCapabilities'
  | 'getOpenapi'
  | 'getAsyncapi'
type CheckpointOperation = 'listCheckpoints' | 'getCheckpoint' | 'createCheckpoint' | 'deleteCheckpoint'
type StepOperation = 'openRun' | 'postStep'
type RunOperation = Exclude<
  keyof Handlers,
  ServiceOperation | CheckpointOperation | StepOperation | ShardOperation | 'openStream'
>

function serviceHandlers({
  config,
  device,
  runs,
  presets,
  metrics,
  contract,
  data,
}: Services): Pick<Handlers, ServiceOperation> {
  const asyncapi = readAsyncapi()
  return {
    getLivez: () => ({ status: 'ok' }),
    getRoot: () => ({ name: 'muond', version: VERSION, links: LINKS }),
    getReadyz: async () => {
      checkReady(device, runs)
      await checkDisk(data)
      return { status: 'ok' }
    },
    getMetrics: async (_request, reply) =>
      reply.type(metrics.registry.contentType).send(await metrics.registry.metrics()),
    getCapabilities: (request) => ({
      ...capabilities({ config, device, presets }),
      quotas: quotasOf(principalIn(request), runs),
    }),
    getOpenapi: (_request, reply) => reply.type('application/yaml').send(contract.text),
    getAsyncapi: (_request, reply) => reply.type('application/yaml').send(asyncapi),
  }
}

function runHandlers({ config, device, runs, cluster, events, readers }: Services): Pick<Handlers, RunOperation> {
  return {
    listRuns: (request) => {
      const principal = principalIn(request)
      const own = ({ name }: { name: string }) => principal.sees(name)
      const inMemory = runs.list().filter(own)
      return {
        runs: [
          ...inMemory.map((run) => runSummary(runs, run)),
          ...[...runs.idle.values()].filter(own).map(idleSummary),
        ],
        stored: [...runs.stored].map(storedRun).filter(own),
        ...(cluster && { wholes: wholesBody(cluster).filter(own) }),
      }
    },
    getRun: ({ params }) => {
      const idle = runs.idle.get(params.run)
      return idle ? idleBody(idle) : runBody(runs, runs.get(params.run))
    },
    deleteRun: async ({ params }, reply) => {
      if (cluster?.wholes.has(params.run)) await cluster.wholes.delete(params.run)
      else await runs.delete(params.run)
      return reply.code(204).send()
    },
    listParameters: async ({ params, query }) => {
      const run = await runs.wake(params.run)
      const total = run.parameters.length
      const count = Math.max(0, Math.min(query.limit, total - query.offset))
      return { parameters: Array.from({ length: count }, (_, i) => parameterSummary(run, query.offset + i)), total }
    },
    getParameter: async ({ params }) => {
      const run = await runs.wake(params.run)
      const summary = parameterSummary(run, params.index)
      return { ...summary, state: await stateNorms(device, { readers, run }, params.index) }
    },
    getState: async (request, reply) => {
      const run = await runs.wake(request.params.run)
      const { length, body } = await runStateBody(runs, { readers, run, meter: bodyMeterIn(request) })
      return reply.type('application/octet-stream').header('content-length', length).send(body)
    },
    putState: async (request) => {
      const { params, query, headers, body, log } = request
      refuseShard(params.run, 'state cannot be imported into it')
      const tensors = streamOf(body)
      return importState({ runs, device, config }, await runs.wake(params.run), {
        ...{ query, headers, body: tensors, log, meter: bodyMeterIn(request) },
      })
    },
    getParameterState: async (request, reply) => {
      const run = await runs.wake(request.params.run)
      const reading = { readers, run, meter: bodyMeterIn(request) }
      const { length, body } = stateBody(device, reading, request.params.index)
      return reply.type('application/octet-stream').header('content-length', length).send(body)
    },
    listReceipts: async ({ params, query }) => {
      const run = await runs.wake(params.run)
      return { receipts: run.receipts(query.after).map(receiptBody) }
    },
    listRefusals: async ({ params }) => ({ refusals: [...(await runs.wake(params.run)).refusals.list()] }),
    streamEvents: (request, reply) => {
      const { params, headers } = request
      const [run, principal] = [runs.get(params.run), principalIn(request)]
      principal.checkConnections()
      events.open(run, reply, Number(headers['last-event-id'] ?? run.step))
      reply.raw.once('close', principal.connect())
      return reply
    },
  }
}

function checkpointHandlers({ runs, data }: Services): Pick<Handlers, CheckpointOperation> {
  const wakeKeeper = async (name: string) => runs.keeper((await runs.wake(name)).name)
  return {
    listCheckpoints: async ({ params }) => {
      const { name } = await runs.wake(params.run)
      if (!data) return { checkpoints: [], reason: 'this service keeps none: it was started without a data folder' }
      const { folder } = runs.keeper(name)
      return { checkpoints: folder.checkpoints.map((entry) => checkpointBody(folder, entry)) }
    },
    getCheckpoint: async ({ params }) => {
      const { folder } = await wakeKeeper(params.run)
      return checkpointBody(folder, findCheckpoint(folder, params))
    },
    createCheckpoint: async ({ params, body }, reply) => {
      const keeper = await wakeKeeper(params.run)
      const tag = checkTag(body?.tag)
      const entry = await betweenSteps(runs, runs.get(params.run), () => keeper.take(tag))
      return reply.code(201).send(checkpointBody(keeper.folder, entry))
    },
    deleteCheckpoint: async ({ params }, reply) => {
      const keeper = await wakeKeeper(params.run)
      await keeper.remove(findCheckpoint(keeper.folder, params))
      return reply.code(204).send()
    },
  }
}

function stepHandlers({ config, runs, cluster, steps }: Services): Pick<Handlers, StepOperation> {
  return {
    openRun: async (request, reply) => {
      const { body, log } = request
      if (body === undefined) throw new ServiceError('REQUEST_INVALID', 'there is no body, expected a JSON one')
      const opened = await openRun({ config, runs, cluster }, body, { principal: principalIn(request), log })
      reply.code(opened.resumed ? 200 : 201)
      return opened
    },
    postStep: (request, reply) => {
      const { params, query, headers, body } = request
      const { step, takeover } = query
      refuseShard(params.run, 'it takes no plain requests')
      const principal = principalIn(request)
      return steps.answer({ run: params.run, step, takeover, principal, headers, body: streamOf(body) }, reply)
    },
  }
}

/** The body of a request whose handler reads it as it comes. */
function streamOf(body: unknown): Readable {
  if (body instanceof Readable) return body
  throw new ServiceError('REQUEST_INVALID', 'there is no body, expected a safetensors one')
}

/** Where to go from `/`. */
const LINKS = {
  dashboard: '/ui',
  documentation: '/docs',
  contract: '/openapi.yaml',
  frames: '/asyncapi.yaml',
  capabilities: '/v1/capabilities',
  runs: '/v1/runs',
  stream: '/v1/stream',
  metrics: '/metrics',
  health: '/livez',
  readiness: '/readyz',
}

/** A service that cannot write acknowledges no step that it promises to keep. */
async function checkDisk(data: DataFolder | undefined): Promise<void> {
  const problem = await data?.problem()
  if (problem !== undefined)
    throw new ServiceError('STORAGE_FAILED', `the data folder cannot be written: ${problem}`, { status: 503 })
}

function checkReady(device: Device, runs: Runs): void {
  if (device.failed)
    throw new ServiceError('DEVICE_FAILED', `the device ${device.backend.name} has failed: ${device.failed.message}`)
  if (runs.restoring) throw new ServiceError('RESTORING', 'runs on the disk are being restored')
  if (runs.draining) throw new ServiceError('DRAINING', 'the service shuts down and begins no step')
}

function capabilities({
  config,
  device,
  presets,
}: Pick<Services, 'config' | 'device' | 'presets'>): Omit<Schemas['Capabilities'], 'quotas'> {
  const { chunk_bytes, staging_bytes, max_runs, max_connections, max_bytes_per_second } = config
  const { max_parameters, receipts_kept, idle_seconds } = config
  const limits = {
    ...{ chunk_bytes, staging_bytes, state_bytes: device.stateBytesLimit, max_runs },
    ...{ max_connections, max_bytes_per_second, max_parameters, receipts_kept, idle_seconds },
  }
  return {
    server: { name: 'muond', version: VERSION },
    protocols: [PROTOCOL],
    algorithms: Object.fromEntries(
      Object.entries(HYPERPARAMETERS).map(([name, table]) => [name, hyperparametersOf(table)]),
    ),
    presets: Object.fromEntries([...presets].map(([name, preset]) => [name, presetBody(preset)])),
    dtypes: [...WIRE_DTYPES],
    devices: [
      {
        name: device.backend.name,
        kind: device.backend.kind,
        onnxruntime: device.backend.version,
        lanes: device.lanes,
      },
    ],
    limits,
  }
}

/** What a principal has, and where its key has quotas, what it may have. */
function quotasOf(principal: Principal, runs: Runs): Schemas['Capabilities']['quotas'] {
  const { quotas, connections, rate } = principal
  const usage = runs.quotas.usage(principal)
  const row = (used: number, quota: number | undefined) => ({ used, ...(quota !== undefined && { quota }) })
  return {
    runs: row(usage.runs, quotas.runs),
    parameters: row(usage.parameters, quotas.parameters),
    state_bytes: row(usage.state_bytes, quotas.state_bytes),
    connections: row(connections, quotas.connections),
    bytes_per_second: row(rate.last(), quotas.bytes_per_second),
  }
}

type Rules = Readonly<Record<string, { default: unknown; expected: string; description: string; sticky: boolean }>>

function hyperparametersOf(rules: Rules): Record<string, Schemas['Hyperparameter']> {
  const entries = Object.entries(rules).map(([name, rule]) => {
    const { default: value, expected, description, sticky } = rule
    return [name, { default: value, expected, description, sticky }] as const
  })
  return Object.fromEntries(entries)
}

function presetBody({ description, source, algorithm, recipes }: Preset): Schemas['Preset'] {
  const hyperparameters = Object.fromEntries(Object.entries(recipes).map(([name, recipe]) => [name, { ...recipe }]))
  return { description, source, algorithm, hyperparameters }
}

function runSummary(runs: Runs, run: Run): Schemas['RunSummary'] {
  const { name, epoch, step, digest, created_at, note } = run
  const parameters = run.parameters.length
  return {
    name,
    epoch,
    step,
    digest,
    created_at,
    in_memory: true,
    connected: run.connected,
    ...memberCounts(run),
    parameters,
    state_bytes: run.stateBytes,
    durable_step: runs.durableStep(run),
    ...run.pace,
    ...(note && { note }),
    ...shardOf(name),
  }
}

function memberCounts({ intake: { members } }: Run): { connected_members?: number; all_members?: number } {
  const { named, world_size, replicas } = members.layout
  return named ? { connected_members: members.connected.length, all_members: world_size * replicas } : {}
}

function idleSummary({ groups: _, attentions: __, ...rest }: IdleRun): Schemas['RunSummary'] {
  return { ...rest, in_memory: false, connected: false, ...shardOf(rest.name) }
}

function idleBody(idle: IdleRun): Schemas['Run'] {
  const { groups, attentions } = idle
  return { ...idleSummary(idle), ahead: [], attentions: [...attentions], groups: { ...groups } }
}

function storedRun([name, detail]: readonly [string, string]): Schemas['StoredRun'] {
  return detail === '' ? { name, status: 'waiting' } : { name, status: 'unreadable', detail }
}

function checkpointBody(folder: RunFolder, entry: CheckpointEntry): Schemas['Checkpoint'] {
  return { ...entry, tags: [...entry.tags], in_history: folder.isInHistory(entry) }
}

function runBody(runs: Runs, run: Run): Schemas['Run'] {
  const { groups, ahead } = run.opened(true)
  const members = memberRows(run)
  return {
    ...runSummary(runs, run),
    ...(members && { members }),
    ...{ ahead: [...ahead], attentions: [...run.attentions], groups: { ...groups } },
  }
}

/** The members of a run that has some: who is connected, and whose `end` of the step in progress has come. */
function memberRows({ intake }: Run): Schemas['Member'][] | undefined {
  const { layout, status } = intake.members
  const ended = new Set(intake.ended)
  const { world_size } = layout
  return layout.named
    ? status.map((member) => ({ ...member, ended: ended.has(memberId({ ...member, world_size })) }))
    : undefined
}

function parameterSummary(run: Run, index: number): Schemas['ParameterSummary'] {
  const { parameter, algorithm, count: updates, state_bytes, last } = run.place(index)
  const plan = explain(parameter, groupOf(parameter, run.groups))
  const { shape, split, ...rest } = describe(parameter)
  const layout = { shape: [...shape], ...(split && { split: [...split] }) }
  return {
    ...rest,
    ...layout,
    algorithm,
    updates,
    state_bytes,
    ...(last && { last }),
    plan: { ...plan, blocks: [...plan.blocks] },
  }
}
