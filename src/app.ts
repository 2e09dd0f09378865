import assert from 'node:assert'
import { setTimeout as delay } from 'node:timers/promises'
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
import { type Config, VERSION } from './config.js'
import { Device } from './device/device.js'
import { ServiceError } from './errors.js'
import { type Access, authenticator, chooseSubprotocol } from './http/auth.js'
import { type Endpoint, endpointsOf, readContract } from './http/contract.js'
import { docs } from './http/docs.js'
import { Events } from './http/events.js'
import { type AnyHandler, createHandlers, type Services } from './http/operations.js'
import { answerClientError, answerProblems, sendProblem } from './http/problem.js'
import type { Log } from './keep/keeper.js'
import { Runs } from './keep/runs.js'
import { Stream } from './link/session.js'
import { InPlaceWebSocket } from './link/websocket/socket.js'
import { createMetrics, type Metrics } from './metrics.js'
import { DataFolder } from './store/data-folder.js'
import { readPresets } from './store/presets.js'
import { OPEN_BYTES, OTHER_KEYS_BYTES } from './wire/frame.js'

/** The service without its process: nothing listens yet, and no environment was read. */
export type App = {
  app: FastifyInstance
  device: Device
  runs: Runs
  /** Where runs are kept; undefined where they are not. */
  data: DataFolder | undefined
  metrics: Metrics
  /** When every run on the disk was restored or found to be unreadable. Streams may open runs before. */
  restored: Promise<void>
  /** Lets the steps in flight end for at most `drain_seconds`, then closes everything. */
  drain(): Promise<void>
}

/** Where nobody gave a logger. */
const SILENT: Log = { info: () => {}, warn: () => {}, error: () => {} }

type Service = Services & { streams: Set<Stream>; data: DataFolder | undefined }

// The largest `open` and the largest chunk are both 16 MiB; the other keys of a frame come on top.
const MAX_MESSAGE_BYTES = OPEN_BYTES + OTHER_KEYS_BYTES
const MAX_BODY_BYTES = 65_536
// The router answers 404 to a longer path parameter: a run name that is too long should be told so.
const MAX_PATH_PARAMETER = 1024
// A peer that does not answer our close frame is cut off after this.
const CLOSE_GRACE_MS = 1000

/** Starts the device and builds the app on it. Throws what the device says about why it cannot start, and ConfigError for a preset. */
export async function buildApp({ config, logger }: { config: Config; logger?: FastifyBaseLogger }): Promise<App> {
  const contract = readContract()
  const presets = readPresets(config.presets)
  const data = config.data ? await DataFolder.open(config.data, config.data_wait_seconds) : undefined
  const device = await Device.start(config).catch(async (error) => {
    await data?.close()
    throw error
  })
  const metrics = createMetrics()
  const runs = new Runs({ device, config, presets, metrics, data, log: logger ?? SILENT })
  const service: Service = {
    config,
    device,
    runs,
    data,
    presets,
    metrics,
    contract,
    events: new Events(),
    streams: new Set(),
  }
  const app = await createServer(service, logger)
  return { app, device, runs, data, metrics, restored: runs.restore(), drain: () => drain(app, service) }
}

async function createServer(service: Service, logger: FastifyBaseLogger | undefined): Promise<FastifyInstance> {
  const { config, metrics, contract } = service
  const app = fastify({
    ...(logger ? { loggerInstance: logger } : {}),
    // Requests are logged as events, by logRequest.
    logController: new LogController({ disableRequestLogging: true }),
    bodyLimit: MAX_BODY_BYTES,
    // While the server closes, requests on open connections are answered like any other, as problem documents.
    return503OnClosing: false,
    routerOptions: { maxParamLength: MAX_PATH_PARAMETER },
    // The contract's lint holds its schemas against their meta-schema: to do so here takes 30 ms of every start.
    ajv: { customOptions: { removeAdditional: false, coerceTypes: true, validateSchema: false } },
    clientErrorHandler: answerClientError,
    frameworkErrors: (error, request, reply) => sendProblem(error, { request, reply, metrics }),
  })
  observe(service)
  // First, because its hooks end the connection of an upgrade that any later hook refuses.
  await registerWebSocket(app, service)
  app.addHook('onRequest', authenticator(config))
  app.addHook('onResponse', logRequest)
  app.addHook('onClose', () => close(service))
  answerProblems(app, metrics)
  await app.register((scope) => docs(scope, contract))
  await app.register((scope) => registerOperations(scope, service))
  await app.ready()
  return app
}

function observe({ device, runs, metrics, streams }: Service): void {
  metrics.observe({
    in_flight_bytes: () => [...streams].reduce((sum, stream) => sum + stream.inFlightBytes, 0),
    staging: () => device.staging,
    state_bytes: () => device.memory.bytes,
    runs: () => runs.list().length,
    connections: () => streams.size,
    build: { version: VERSION, onnxruntime: device.backend.version, device: device.backend.name },
  })
}

async function registerWebSocket(app: FastifyInstance, { events }: Service): Promise<void> {
  const options: WebsocketPluginOptions['options'] = {
    maxPayload: MAX_MESSAGE_BYTES,
    perMessageDeflate: false,
    // The stream answers pings: ws cuts a connection on which 60 of its own answers wait.
    autoPong: false,
    handleProtocols: chooseSubprotocol,
  }
  // The option's type asks for the statics of the ws module, which a subclass inherits but its type does not show.
  Reflect.set(options, 'WebSocket', InPlaceWebSocket)
  await app.register(websocket, {
    options,
    // A socket's own errors come here as well, after ws has begun to close it with a code of its own.
    errorHandler: (error, socket, request) => {
      request.log.info({ event: 'stream_error', err: error })
      socket.close(1011)
    },
    preClose: () => closeConnections(app, events),
  })
  app.websocketServer.on('wsClientError', answerClientError)
}

/** Closes every stream with 1012, and gives requests that are being answered as long as the streams have. */
async function closeConnections({ server, websocketServer }: FastifyInstance, events: Events): Promise<void> {
  events.end()
  // A connection that never sent a request is not idle to node: it would hold the shutdown up for a minute.
  const cut = setTimeout(() => server.closeAllConnections(), CLOSE_GRACE_MS).unref()
  server.once('close', () => clearTimeout(cut))
  const sockets = [...websocketServer.clients]
  for (const socket of sockets) socket.close(1012, 'the service shuts down')
  await closed(sockets, CLOSE_GRACE_MS)
  for (const socket of sockets) socket.terminate()
  websocketServer.close()
}

/** Makes a route of every operation of the contract, and of every other method on its paths a 405. */
async function registerOperations(scope: FastifyInstance, service: Service): Promise<void> {
  const handlers: Readonly<Record<string, AnyHandler>> = createHandlers(service)
  takeStreams(scope)
  const endpoints = endpointsOf(service.contract)
  // The plugin of `/docs` serves that operation.
  for (const endpoint of endpoints.filter(({ id }) => id !== 'getDocs'))
    scope.route(routeOf(endpoint, handlers[endpoint.id], service))
  for (const url of new Set(endpoints.map(({ url }) => url))) refuseOtherMethods(scope, url)
}

function routeOf(endpoint: Endpoint, handler: AnyHandler | undefined, service: Service): RouteOptions {
  const { id, method, url, schema } = endpoint
  assert(handler, `operation ${id} has no handler`)
  const config = { access: accessOf(endpoint), streamed: id === 'putState' }
  const route: RouteOptions = { method, url, schema, handler, config, exposeHeadRoute: !STREAMED.has(id) }
  if (id !== 'openStream') return route
  const onRequest = async (request: FastifyRequest) => refuseUpgrade(request, service)
  const wsHandler = (socket: WebSocket, request: FastifyRequest) => openStream(socket, request, service)
  return { ...route, onRequest, wsHandler, exposeHeadRoute: false }
}

/** Operations whose answer is not made at once: a HEAD would make it only to throw it away. */
const STREAMED: ReadonlySet<string> = new Set(['streamEvents', 'getParameterState', 'getState'])

/** State comes as a stream of any length: its handler reads it, and holds it against what the run can have. */
function takeStreams(scope: FastifyInstance): void {
  scope.addContentTypeParser('application/octet-stream', (request, payload, done) => {
    if (request.routeOptions.config.streamed) return done(null, payload)
    done(Object.assign(new Error('Unsupported Media Type'), { statusCode: 415 }))
  })
}

/** The contract says which operations are open to all; whatever is not a plain GET needs a key that may write. */
function accessOf({ id, method, open }: Endpoint): Access {
  if (open) return 'open'
  return method === 'GET' && id !== 'openStream' ? 'read' : 'write'
}

function refuseOtherMethods(scope: FastifyInstance, url: string): void {
  const allowed = scope.supportedMethods.filter((method) => scope.hasRoute({ method, url })).sort()
  const method = scope.supportedMethods.filter((other) => !allowed.includes(other))
  const refuse = async (request: FastifyRequest, reply: FastifyReply) => {
    reply.header('allow', allowed.join(', '))
    const message = `${request.method} is not allowed here, allowed are ${allowed.join(', ')}`
    throw Object.assign(new Error(message), { statusCode: 405 })
  }
  // In onRequest, before a body is read that nobody needs.
  scope.route({ method, url, onRequest: refuse, handler: refuse })
}

function refuseUpgrade({ ws }: FastifyRequest, { runs, streams, config }: Service): void {
  if (!ws) return
  if (runs.draining) throw new ServiceError('DRAINING', 'the service shuts down and takes no stream')
  if (streams.size < config.max_connections) return
  throw new ServiceError('OVERLOADED', `there are ${streams.size} streams, at most ${config.max_connections}`, {
    retry_after_seconds: 1,
  })
}

function openStream(
  socket: WebSocket,
  { raw, log }: FastifyRequest,
  { config, device, runs, metrics, streams }: Service,
): void {
  const stream = new Stream(socket, { config, device, runs, metrics, log, bytesRead: () => raw.socket.bytesRead })
  streams.add(stream)
  socket.once('close', () => streams.delete(stream))
  if (socket instanceof InPlaceWebSocket && socket.inPlace) metrics.in_place_connections_total.inc()
}

/** Streams are closed already. What was begun for them ends first, as it needs what is closed after it. */
async function close({ runs, data, device }: Service): Promise<void> {
  await runs.close()
  await data?.close()
  await device.close()
}

async function drain(app: FastifyInstance, { config, runs, streams }: Service): Promise<void> {
  runs.draining = true
  const sockets = [...app.websocketServer.clients]
  for (const stream of streams) stream.drain(config.drain_seconds)
  await closed(sockets, config.drain_seconds * 1000)
  await runs.checkpoint()
  await app.close()
}

/** Waits until all sockets are closed, at most `milliseconds`. */
async function closed(sockets: readonly WebSocket[], milliseconds: number): Promise<void> {
  const waiting = sockets.filter((socket) => socket.readyState !== socket.CLOSED)
  const all = Promise.all(waiting.map((socket) => new Promise((resolve) => socket.once('close', resolve))))
  const timer = new AbortController()
  const deadline = delay(milliseconds, undefined, { signal: timer.signal }).catch(() => undefined)
  await Promise.race([all, deadline])
  timer.abort()
}

async function logRequest(request: FastifyRequest, reply: FastifyReply): Promise<void> {
  const { method, url } = request.routeOptions
  request.log.debug({
    event: 'request',
    method,
    route: url,
    status: reply.statusCode,
    seconds: reply.elapsedTime / 1000,
  })
}
