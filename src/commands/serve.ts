import closeWithGrace from 'close-with-grace'
import { type Logger, pino } from 'pino'
import { type App, buildApp } from '../app.js'
import { type Config, type Environment, readCommand, unknownVariables } from '../config.js'

// How long closing may take after the drain: close frames, and lanes that end their work.
const CLOSE_SECONDS = 10
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
  const built = await buildApp({ config, logger })
  const address = await listen(built, config, logger)
  closeOnSignals(built, config, logger)
  const { device } = built
  logger.info({
    event: 'listening',
    address,
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

async function listen({ app }: App, { host, port }: Config, logger: Logger): Promise<string> {
  // fastify would log the address in words of its own; `listening` has to be the first line.
  const { level } = logger
  logger.level = 'silent'
  const address = await app.listen({ host, port })
  logger.level = level
  return address
}

function closeOnSignals({ app, drain }: App, { drain_seconds, data }: Config, logger: Logger): void {
  const delay = (drain_seconds + CLOSE_SECONDS + (data ? CHECKPOINT_SECONDS : 0)) * 1000
  closeWithGrace({ delay, logger }, async ({ signal, err }) => {
    if (err) {
      // A bug: nothing can be relied on, so no step is drained. The lanes still have to end before the process.
      logger.fatal({ event: 'crashed', err })
      return app.close()
    }
    logger.info({ event: 'draining', signal, deadline_seconds: drain_seconds })
    await drain()
    logger.info({ event: 'stopped' })
  })
}
