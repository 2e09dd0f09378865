import { once } from 'node:events'
import { accessSync, constants } from 'node:fs'
import { type ClientRequest, request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest } from 'node:https'
import { createServer } from 'node:net'
import { dirname } from 'node:path'
import type { Config } from '../../../config.js'
import { errorText } from '../../../errors.js'
import { whatIsAt } from '../../../http/listening/local-socket.js'
import { speaksTls } from '../../../http/listening/tls.js'
import { type Finding, failure, finding, ok, taken } from './finding.js'

const ANSWER_MS = 2000
/** Where somebody who listens on every address is reached. */
const LOOPBACKS: Readonly<Record<string, string>> = { '0.0.0.0': '127.0.0.1', '::': '::1' }

/** Whether the service could listen on its port, and who does where it could not. */
export async function checkPort(config: Config): Promise<Finding[]> {
  const { host, port } = config
  const address = `${host.includes(':') ? `[${host}]` : host}:${port}`
  const problem = await bind(host, port)
  if (problem === undefined)
    return [ok('port', port === 0 ? `a free one of ${host} will be picked` : `${address} is free`)]
  switch (problem.code) {
    case 'EADDRINUSE': {
      const who = await answerAt({ host: LOOPBACKS[host] ?? host, port }, speaksTls(config))
      const found = `${address} is in use: ${who ?? 'another program'} listens there`
      if (who === undefined) return [failure('port', found, 'end that program, or take another --port')]
      return [taken('port', found, '--port')]
    }
    /* c8 ignore next 2 -- the user of the tests may be root, who may listen everywhere */
    case 'EACCES':
      return [failure('port', `${address}: this user may not listen there`, 'take a --port from 1024 on')]
    default:
      return [failure('port', errorText(problem), '--host is an address of this machine; 0.0.0.0 is every IPv4 one')]
  }
}

/** Whether the service could make its Unix socket. */
export function checkSocket({ socket }: Config): Promise<Finding[]> {
  return finding('socket', 'give --socket another path', async () => {
    const found = await whatIsAt(socket)
    if (found === 'a server') {
      const who = await answerAt({ socketPath: socket }, false)
      const text = `${socket} is in use: ${who ?? 'another program'} listens there`
      if (who === undefined) return failure('socket', text, 'end that program, or take another --socket')
      return taken('socket', text, '--socket')
    }
    const folder = dirname(socket)
    try {
      accessSync(folder, constants.W_OK | constants.X_OK)
    } catch (error) {
      return failure('socket', `none can be made in ${folder}: ${errorText(error)}`, 'make the folder, for this user')
    }
    return ok('socket', found === 'nothing' ? `${socket} is free` : `${socket} is one that an ended service has left`)
  })
}

/** Listens for a moment, and takes no connection; the error where that is not possible. */
async function bind(host: string, port: number): Promise<NodeJS.ErrnoException | undefined> {
  const server = createServer((socket) => socket.destroy())
  try {
    const listening = once(server, 'listening')
    server.listen({ host, port, exclusive: true })
    await listening
    const closed = once(server, 'close')
    server.close()
    await closed
    return undefined
  } catch (error) {
    if (error instanceof Error) return error
    /* c8 ignore next 2 -- a server fails with errors */
    throw error
  }
}

type Place = { host: string; port: number } | { socketPath: string }

/** Which service answers there; undefined where what answers, if anything does, is none. */
async function answerAt(place: Place, secure: boolean): Promise<string | undefined> {
  const options = { ...place, path: '/', agent: false, timeout: ANSWER_MS, rejectUnauthorized: false }
  const outgoing = secure ? httpsRequest(options) : httpRequest(options)
  /* c8 ignore next -- takes the two seconds */
  outgoing.once('timeout', () => outgoing.destroy(new Error('no answer')))
  const answer = await bodyOf(outgoing)
    .then(JSON.parse)
    .catch(() => ({}))
  outgoing.destroy()
  return answer.name === 'muond' ? `muond ${answer.version}` : undefined
}

async function bodyOf(outgoing: ClientRequest): Promise<string> {
  const answered: Promise<IncomingMessage[]> = once(outgoing.end(), 'response')
  const [response] = await answered
  return Buffer.concat(await response.toArray()).toString()
}
