import assert from 'node:assert'
import type { RequestListener, Server } from 'node:http'
import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { promisify } from 'node:util'
import websocket, { type WebsocketPluginOptions } from '@fastify/websocket'
import fastify, {
  type FastifyBaseLogger,
  type FastifyInstance,
  type FastifyReply,
  type FastifyRequest,
  LogController,
  type RouteOptions,
} from 'fastify'
import type { WebSocket } from 'ws'
import { Keys } from './access/keys.js'
import { Rate } from './access/rate.js'
import { Refusals } from './access/refusals.js'
import { Cluster } from './cluster/cluster.js'
import { type Config, VERSION } from './config.js'
import { Device } from './device/device.js'
import { ServiceError } from './errors.js'
import { authenticator, chooseSubprotocol, principalIn, runGuard } from './http/auth.js'
import { refuseEncodings, takeBodies, validatorOf } from './http/bodies.js'
import { VOTE_BYTES } from './http/cluster/shards.js'
import { type Endpoint, endpointsOf, readContract, STREAMED, STREAMED_BODIES, WHOLES } from './http/contract.js'
import { Events } from './http/events.js'
import { type LocalSocket, listenLocally } from './http/listening/local-socket.js'
import { limitSockets } from './http/listening/sockets.js'
import { createSecureServer, readCredentials, renewal, speaksTls } from './http/listening/tls.js'
import { meterBodies } from './http/metered.js'
import { type AnyHandler, createHandlers, type Page, type Services } from './http/operations.js'
import { originGuard } from './http/origin.js'
import { limitAnswer, limitBody } from './http/pace.js'
import { docs } from './http/pages/docs.js'
import { ui } from './http/pages/ui.js'
import { answerClientError, answerProblems, sendProblem } from './http/problem.js'
import { StateReaders } from './http/readers.js'
import { refusalLimit } from './http/refusal-limit.js'
import { OPEN_BODY_BYTES } from './http/steps/open-run.js'
import { PlainSteps } from './http/steps/plain-steps.js'
import type { Log } from './keep/keeper.js'
import { Runs } from './keep/runs.js'
import { Session } from './link/session.js'
import { Intake } from './link/websocket/intake.js'
import { InPlaceWebSocket } from './link/websocket/socket.js'
import { createMetrics, type Metrics, type RunPulse } from './metrics.js'
import type { Run } from './run/run.js'
import type { DataStore } from './store/data-store.js'
import { openData } from './store/open-data.js'
import { readPresets } from './store/presets.js'
import type { Tracing } from './tracing.js'
import { MESSAGE_BYTES } from './wire/frame.js'

/** The service without its process: it does not listen yet, and has read no environment variable. */
export type App = {
  app: FastifyInstance
  device: Device
  runs: Runs
  /** What runs are kept in; undefined without the setting `data`. */
  data: DataStore | undefined
  metrics: Metrics
  /** Resolves when every run on the disk is restored or known to be unreadable. Streams may open runs before. */
  restored: Promise<void>
  /**
   * Takes connections from a Unix socket at `path` too, until the app is closed. Throws ConfigError where there can be
   * none.
   */
  listenLocally(path: string): Promise<void>
  /**
   * Reads the files of keys and certificates again. Throws ConfigError for one that cannot be used, and then goes on
   * with those of before.
   */
  reload(): { keys: number }
  /** Waits at most `drain_seconds` for the steps in flight, takes checkpoints, and closes everything. */
  drain(): Promise<void>
}

/** The log of an app without a logger. */
const SILENT: Log = { info: () => {}, warn: () => {}, error: () => {} }

type AppServices = Services & {
  keys: Keys
  /** Of the bytes that all principals move. */
  rate: Rate
  streams: Set<Session>
  local: Set<LocalSocket>
  intake: Intake
  data: DataStore | undefined
  /** Undefined where nothing is traced. */
  tracing: Tracing | undefined
}

const MAX_BODY_BYTES = 65_536
// The router answers 404 to a longer path parameter. A run name that is too long should get a better answer than that.
const MAX_PATH_PARAMETER = 1024
// How often node looks for sockets whose request does not come.
const HTTP = { connectionsCheckingInterval: 1000 }
// A peer that does not answer our close frame is cut off after this.
const CLOSE_GRACE_MS = 1000
// A peer that is silent for so long is asked by TCP whether it is still there: one that lost its power never says so.
const KEEPALIVE_MS = 60_000

/**
 * Starts the device and builds the app on it. Throws the device's reason where it cannot start, and ConfigError for
 * keys, a certificate, a preset or a data folder that cannot be used.
 */
export async function buildApp({
  config,
  logger,
  tracing,
}: {
  config: Config
  logger?: FastifyBaseLogger
  tracing?: Tracing | undefined
}): Promise<App> {
  const contract = readContract()
  const keys = new Keys(config)
  if (speaksTls(config)) readCredentials(config)
  const presets = readPresets(config.presets)
  const metrics = createMetrics()
  const data = await openData(config, metrics)
  const device = await Device.start(config).catch(async (error) => {
    await data?.close()
    throw error
  })
  const log = logger ?? SILENT
  const runs = new Runs({ device, config, presets, metrics, data, log, ...(tracing && { watch: tracing.watch }) })
  const cluster = await Cluster.start({ config, presets, runs, metrics, log }).catch(async (error) => {
    await close({ runs, data, device })
    throw error
  })
  const intake = new Intake(config.unfinished_bytes, ({ code, message }) => {
    log.warn({ event: 'refused', code, reason: message })
    metrics.errors_total.inc({ code })
  })
  const rate = new Rate(() => config.max_bytes_per_second || undefined)
  const streams = new Set<Session>()
  const services: AppServices = {
    config,
    keys,
    rate,
    device,
    runs,
    cluster,
    data,
    presets,
    metrics,
    contract,
    events: new Events(),
    readers: new StateReaders(device),
    streams,
    steps: new PlainSteps({ config, device, metrics, runs, rate, connections: () => streams.size }),
    local: new Set(),
    intake,
    tracing,
  }
  return appOf(await createServer(services, logger), services)
}

function appOf(app: FastifyInstance, services: AppServices): App {
  const { config, keys, device, runs, data, metrics } = services
  const reload = () => {
    const renew = renewal(app.server, config)
    const reloaded = keys.reload()
    renew()
    return reloaded
  }
  const listen = async (path: string) => void services.local.add(await listenLocally(app.server, path))
  const restored = runs.restore()
  return {
    app,
    device,
    runs,
    data,
    metrics,
    restored,
    listenLocally: listen,
    reload,
    drain: () => drain(app, services),
  }
}

async function createServer(services: AppServices, logger: FastifyBaseLogger | undefined): Promise<FastifyInstance> {
  const { config, metrics, contract, keys, runs, cluster } = services
  const app = fastify({
    ...(speaksTls(config) && { serverFactory: secureFactory(config) }),
    ...(logger ? { loggerInstance: logger } : {}),
    // recordRequest logs requests as events.
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: MAX_BODY_BYTES,
    // While the server closes, requests on open connections are answered like any other, as problem documents.
    return503OnClosing: false,
    http: HTTP,
    routerOptions: { maxParamLength: MAX_PATH_PARAMETER },
    clientErrorHandler: answerClientError,
    frameworkErrors: (error, request, reply) => sendProblem(error, { request, reply, metrics }),
  })
  app.setValidatorCompiler(({ schema, httpPart }) => validatorOf(schema, httpPart))
  observe(app, services)
  // Every socket counts from its first byte, whatever it becomes, and sends a request or goes.
  limitSockets(app.server, config.max_sockets, () => metrics.refused_sockets_total.inc())
  app.server.headersTimeout = config.open_timeout_seconds * 1000
  // First, because its hooks end the connection of an upgrade that any later hook refuses.
  await registerWebSocket(app, services)
  app.decorateRequest('principal', null)
  app.decorateRequest('bodyMeter', null)
  app.addHook('onRequest', originGuard(config))
  app.addHook('onRequest', authenticator(keys))
  app.addHook('onRequest', meterBodies(services.rate))
  app.addHook('onRequest', refuseOtherUpgrades)
  app.addHook('preParsing', refuseEncodings)
  app.addHook('preParsing', limitBody(config))
  app.addHook(
    'onSend',
    limitAnswer(config, ({ code }) => metrics.errors_total.inc({ code })),
  )
  app.addHook('preHandler', runGuard(runs, cluster?.wholes))
  app.addHook('onResponse', (request, reply) => recordRequest(request, reply, metrics))
  app.addHook('onClose', () => close(services))
  answerProblems(app, metrics, refusalLimit(new Refusals(config.max_refusals_per_minute)))
  await app.register((scope) => docs(scope, contract))
  await app.register(ui)
  await app.register((scope) => registerOperations(scope, services))
  await app.ready()
  return app
}

/** The server of HTTP over TLS, on which fastify then sets the same timeouts as on its own. */
function secureFactory(config: Config): (handler: RequestListener) => Server {
  const handshakeTimeout = config.open_timeout_seconds * 1000
  return (handler) => createSecureServer(config, { ...HTTP, handshakeTimeout }, handler)
}

function observe({ server }: FastifyInstance, services: AppServices): void {
  const { config, device, runs, metrics, streams, steps, intake } = services
  metrics.observe({
    sockets: promisify(server.getConnections).bind(server),
    unfinished_bytes: () => intake.bytes,
    in_flight_bytes: () => [...streams].reduce((sum, stream) => sum + stream.inFlightBytes, steps.inFlightBytes),
    staging: () => {
      const own = runs.list().reduce((sum, { staging }) => sum + staging.ownBytes, 0)
      return { used: device.staging.used, capacity: device.staging.capacity, own }
    },
    state_bytes: () => device.memory.bytes,
    runs: () => runs.list().length,
    connections: () => streams.size,
    members: () => runs.list().reduce((sum, run) => sum + membersOf(run), 0),
    limits: {
      runs: config.max_runs,
      connections: config.max_connections,
      sockets: config.max_sockets,
      state_bytes: device.stateBytesLimit,
      unfinished_bytes: config.unfinished_bytes,
    },
    pulses: config.run_metrics ? () => runs.list().map(pulseOf) : undefined,
    build: { version: VERSION, onnxruntime: device.backend.version, device: device.backend.name },
  })
}

function pulseOf(run: Run): RunPulse {
  const { name, step, connected, pace } = run
  const [last] = run.receipts(step - 1)
  return {
    ...{ run: name, step, connected },
    last_step_timestamp_seconds: pace && Date.parse(pace.last_step_at) / 1000,
    step_seconds: pace?.step_seconds,
    gradient_norm: last?.receipt.gradient_norm,
    update_rms: last?.measured?.update_rms,
    max_logit: last?.receipt.max_logit,
  }
}

function membersOf({ intake: { members } }: Run): number {
  return members.layout.named ? members.connected.length : 0
}

async function registerWebSocket(app: FastifyInstance, services: AppServices): Promise<void> {
  const options: WebsocketPluginOptions['options'] = {
    maxPayload: MESSAGE_BYTES,
    perMessageDeflate: false,
    // Text is refused in words by the stream, also where it is msgpack that a client has sent as text by mistake.
    skipUTF8Validation: true,
    // The stream answers pings: ws cuts a connection on which 60 of its own answers wait.
    autoPong: false,
    handleProtocols: chooseSubprotocol,
  }
  // The option's type wants the static members of ws's class. A subclass inherits them, but its type does not show it.
  Reflect.set(options, 'WebSocket', InPlaceWebSocket)
  await app.register(websocket, {
    options,
    // Errors of a socket come here too, after ws has begun to close it with a code of its own.
    errorHandler: (error, socket, request) => {
      request.log.info({ event: 'stream_error', err: error })
      socket.close(1011)
    },
    preClose: () => closeConnections(app, services),
  })
  app.websocketServer.on('wsClientError', answerClientError)
}

/** Closes every stream with 1012. Streams and requests in progress have CLOSE_GRACE_MS to end. */
async function closeConnections(
  { server, websocketServer }: FastifyInstance,
  { events, local }: AppServices,
): Promise<void> {
  events.end()
  for (const socket of local) socket.close()
  // node does not count a connection that never sent a request as idle, and would wait a minute for it.
  const cut = setTimeout(() => server.closeAllConnections(), CLOSE_GRACE_MS).unref()
  server.once('close', () => clearTimeout(cut))
  const sockets = [...websocketServer.clients]
  for (const socket of sockets) socket.close(1012, 'the service shuts down')
  await closed(sockets, CLOSE_GRACE_MS)
  for (const socket of sockets) socket.terminate()
  websocketServer.close()
}

/** Makes a route of every operation of the contract, and of every other method on its paths a 405. */
async function registerOperations(scope: FastifyInstance, services: AppServices): Promise<void> {
  const handlers: Readonly<Record<string, AnyHandler>> = createHandlers(services)
  takeBodies(scope)
  const endpoints = endpointsOf(services.contract)
  for (const endpoint of endpoints.filter(({ id }) => !PAGES.has(id)))
    scope.route(routeOf(endpoint, handlers[endpoint.id], services))
  for (const url of new Set(endpoints.map(({ url }) => url))) refuseOtherMethods(scope, url)
}

function routeOf(endpoint: Endpoint, handler: AnyHandler | undefined, services: AppServices): RouteOptions {
  const { id, method, url, access, schema } = endpoint
  assert(handler, `operation ${id} has no handler`)
  const config = { access, streamed: STREAMED_BODIES.has(id), endless: id === 'streamEvents', wholes: WHOLES.has(id) }
  const bodyLimit = BODY_BYTES[id] ?? MAX_BODY_BYTES
  const route: RouteOptions = { method, url, schema, handler, config, bodyLimit, exposeHeadRoute: !STREAMED.has(id) }
  if (id !== 'openStream') return route
  const onRequest = async (request: FastifyRequest) => refuseUpgrade(request, services)
  const wsHandler = (socket: WebSocket, request: FastifyRequest) => openStream(socket, request, services)
  return { ...route, config: { ...config, upgradable: true }, onRequest, wsHandler, exposeHeadRoute: false }
}

/** Most bytes of the bodies that are larger than others. */
const BODY_BYTES: Readonly<Record<string, number>> = { openRun: OPEN_BODY_BYTES, postVote: VOTE_BYTES }

/** Operations that the plugins of these pages serve. */
const PAGES: ReadonlySet<string> = new Set<Page>(['getDocs', 'getUi'])

function refuseOtherMethods(scope: FastifyInstance, url: string): void {
  const allowed = scope.supportedMethods.filter((method) => scope.hasRoute({ method, url })).sort()
  const method = scope.supportedMethods.filter((other) => !allowed.includes(other))
  const refuse = async (request: FastifyRequest, reply: FastifyReply) => {
    reply.header('allow', allowed.join(', '))
    const message = `${request.method} is not allowed here, allowed are ${allowed.join(', ')}`
    throw Object.assign(new Error(message), { statusCode: 405 })
  }
  // In onRequest already, so that no body is read in vain.
  scope.route({ method, url, onRequest: refuse, handler: refuse })
}

/** A WebSocket on any other route would be nobody's: it would buffer what comes until it is closed. */
async function refuseOtherUpgrades({ ws, routeOptions, method, url }: FastifyRequest): Promise<void> {
  if (!ws || routeOptions.config.upgradable) return
  const request = `${method} ${url.split('?')[0]}`
  throw new ServiceError('REQUEST_INVALID', `only /v1/stream is a WebSocket: ask for ${request} without 'Upgrade'`)
}

function refuseUpgrade(request: FastifyRequest, { runs, streams, steps, config }: AppServices): void {
  if (!request.ws) return
  principalIn(request).checkConnections()
  if (runs.draining) throw new ServiceError('DRAINING', 'the service shuts down and takes no stream')
  const count = streams.size + steps.size
  if (count < config.max_connections) return
  throw new ServiceError('OVERLOADED', `there are ${count} streams, at most ${config.max_connections}`, {
    retry_after_seconds: 1,
  })
}

function openStream(
  socket: WebSocket,
  request: FastifyRequest,
  { config, device, runs, cluster, metrics, rate, streams, intake }: AppServices,
): void {
  const { raw, log } = request
  const [local, principal] = [isLocal(raw.socket), principalIn(request)]
  const means = { config, device, runs, cluster, metrics, intake, log, stream: raw.socket, local, principal, rate }
  const stream = new Session(socket, means)
  streams.add(stream)
  raw.socket.setKeepAlive(true, KEEPALIVE_MS)
  socket.once('close', () => streams.delete(stream))
  if (socket instanceof InPlaceWebSocket && socket.inPlace) metrics.in_place_connections_total.inc()
}

/** Whether a peer is on this host: only such a one can share memory. Sockets of files have no address. */
function isLocal({ remoteAddress }: Socket): boolean {
  return remoteAddress === undefined || /^(::ffff:)?127\.|^::1$/.test(remoteAddress)
}

/** Closes all that streams use, which are closed already. Runs go first: they need the data folder and the device. */
async function close({
  cluster,
  runs,
  data,
  device,
  tracing,
}: Pick<AppServices, 'runs' | 'data' | 'device'> & Partial<AppServices>): Promise<void> {
  await cluster?.close()
  await runs.close()
  await tracing?.close()
  await data?.close()
  await device.close()
}

async function drain(app: FastifyInstance, { config, runs, streams, steps }: AppServices): Promise<void> {
  runs.draining = true
  const sockets = [...app.websocketServer.clients]
  for (const stream of streams) stream.drain(config.drain_seconds)
  await Promise.all([closed(sockets, config.drain_seconds * 1000), within(steps.idle(), config.drain_seconds * 1000)])
  await runs.checkpoint()
  await app.close()
}

/** Waits until all sockets are closed, at most `milliseconds`. */
async function closed(sockets: readonly WebSocket[], milliseconds: number): Promise<void> {
  const waiting = sockets.filter((socket) => socket.readyState !== socket.CLOSED)
  await within(
    Promise.all(waiting.map((socket) => new Promise((resolve) => socket.once('close', resolve)))),
    milliseconds,
  )
}

/** Waits for a promise, at most `milliseconds`. */
async function within(promise: Promise<unknown>, milliseconds: number): Promise<void> {
  const timer = new AbortController()
  const deadline = delay(milliseconds, undefined, { signal: timer.signal }).catch(() => undefined)
  await Promise.race([promise, deadline])
  timer.abort()
}

async function recordRequest(request: FastifyRequest, reply: FastifyReply, metrics: Metrics): Promise<void> {
  const { method } = request
  const { url: route = 'none', config } = request.routeOptions
  const { statusCode: status } = reply
  const seconds = reply.elapsedTime / 1000
  request.log.debug({ event: 'request', method, route, status, seconds })
  if (!config.endless && !request.ws) metrics.http_request_seconds.observe({ method, route, status }, seconds)
}
