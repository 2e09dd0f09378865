import closeWithGrace from 'close-with-grace'
import { type Logger, pino } from 'pino'
import { type App, buildApp } from '../app.js'
import { type Config, type Environment, readCommand, unknownVariables, VERSION } from '../config.js'
import { errorText } from '../errors.js'
import { startTracing } from '../tracing.js'

/** Each is a wish that the service ends. SIGHUP is one only where there are no files to be read again. */
const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT', 'SIGUSR2'] as const
// npm hands Ctrl-C on, so that the service gets it from the terminal and from npm: within so long it is one.
const ECHO_MS = 500
// What closing needs beyond the drain itself: close frames, lanes that end their work.
const CLOSE_SECONDS = 10
// Connections that wait to be accepted. Beyond it the kernel drops what asks for one, which asks again a second later:
// with node's 511 a crowd of new sockets made a health probe wait for so long. Linux takes 4096 at most by itself.
const BACKLOG = 4096
// How long the last checkpoints may take beside that. A supervisor that kills the process before loses the steps
// since the last checkpoint; with a journal it loses none.
const CHECKPOINT_SECONDS = 600

/** `muond serve`, and `muond` alone: starts the service, or returns the text of `--help` or `--version`. */
export async function serveCommand(argv: readonly string[], env: Environment): Promise<string | undefined> {
  const command = readCommand(argv, env)
  if (command.kind === 'print') return command.text
  await serve(command.config)
  return undefined
}

async function serve(config: Config): Promise<void> {
  const logger = pino({ level: config.log_level })
  const tracing = await startTracing(process.env, VERSION)
  const built = await buildApp({ config, logger, tracing })
  const address = await listen(built, config, logger)
  closeOnSignals(built, config, logger)
  void built.data?.lost.then(
    /* c8 ignore next -- needs an S3 store that two processes share: npm run test:objects */
    (reason) => endWithoutData(built, reason, logger),
  )
  const { device } = built
  logger.info({
    event: 'listening',
    address,
    ...(config.socket !== '' && { socket: config.socket }),
    device: device.backend.name,
    onnxruntime: device.backend.version,
    lanes: device.lanes,
    pid: process.pid,
  })
  if (device.backend.note)
    logger.info({ event: 'device_chosen', device: device.backend.name, reason: device.backend.note })
  if (!config.data)
    logger.warn({ event: 'state_not_durable', reason: 'there is no data folder: state ends with the process' })
  const unknown = unknownVariables(process.env)
  if (unknown.length > 0) logger.warn({ event: 'unknown_variables', names: unknown })
}

async function listen({ app, listenLocally }: App, { host, port, socket }: Config, logger: Logger): Promise<string> {
  // fastify would log the address in words of its own; `listening` has to be the first line.
  const { level } = logger
  logger.level = 'silent'
  const address = await app.listen({ host, port, backlog: BACKLOG })
  if (socket !== '') await listenLocally(socket)
  logger.level = level
  return address
}

/** Whether keys or certificates are in files, which SIGHUP has read again. */
function hasFiles({ keys_file, tls_cert }: Config): boolean {
  return keys_file !== '' || tls_cert !== ''
}

function reload(built: App, logger: Logger): void {
  try {
    logger.info({ event: 'reloaded', ...built.reload() })
  } catch (error) {
    logger.error({
      event: 'reload_failed',
      reason: errorText(error),
      remedy: 'the keys and certificates are as before',
    })
  }
}

function closeOnSignals(built: App, config: Config, logger: Logger): void {
  const { app, drain } = built
  const { drain_seconds, data } = config
  const delay = (drain_seconds + CLOSE_SECONDS + (data ? CHECKPOINT_SECONDS : 0)) * 1000
  // Its own way with a second signal is to end without a word of what is lost.
  const grace = closeWithGrace({ delay, logger, skip: [...SIGNALS] }, async ({ err }) => {
    if (err) {
      // A bug: nothing can be relied on, so no step is drained. The lanes still have to end before the process.
      logger.fatal({ event: 'crashed', err })
      return app.close()
    }
    await drain()
    logger.info({ event: 'stopped' })
  })
  let first: { signal: NodeJS.Signals; at: number } | undefined
  const heard = (signal: NodeJS.Signals) => {
    if (signal === 'SIGHUP' && hasFiles(config)) return reload(built, logger)
    const now = performance.now()
    if (first === undefined) {
      first = { signal, at: now }
      logger.info({ event: 'draining', signal, deadline_seconds: drain_seconds })
      return void grace.close()
    }
    if (signal === first.signal && now - first.at < ECHO_MS) return
    endAtOnce(built, signal, logger)
  }
  for (const signal of SIGNALS) process.on(signal, heard)
}

/* c8 ignore start -- needs an S3 store that two processes share: npm run test:objects */
/**
 * Another service has the runs: what this one computed from here on would be kept by nobody. Clients are sent away
 * without the steps in flight, and find the other one.
 */
async function endWithoutData({ app }: App, reason: string, logger: Logger): Promise<void> {
  logger.fatal({ event: 'data_lost', reason })
  await app.close()
  process.exit(1)
}
/* c8 ignore stop */

/** Ends the process for whoever has no patience, and says which acknowledged steps no disk has. */
function endAtOnce({ runs, data }: App, signal: NodeJS.Signals, logger: Logger): void {
  const lost = runs
    .list()
    .map((run) => ({ run: run.name, step: run.step, durable_step: runs.durableStep(run) }))
    .filter(({ step, durable_step }) => data !== undefined && step > durable_step)
  logger.error({ event: 'ended', signal, lost })
  process.exit(1)
}
