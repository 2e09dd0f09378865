import { readFileSync } from 'node:fs'
import type { RequestListener, Server } from 'node:http'
import { createServer, Server as SecureServer, type ServerOptions } from 'node:https'
import type { Socket } from 'node:net'
import { createSecureContext } from 'node:tls'
import { type Config, ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'

export type TlsSettings = Pick<Config, 'tls_cert' | 'tls_key' | 'tls_client_ca'>
type Credentials = { cert: Buffer; key: Buffer; ca?: Buffer }

/** Whether a server with these settings speaks TLS. */
export function speaksTls({ tls_cert }: TlsSettings): boolean {
  return tls_cert !== ''
}

/** A server of HTTP over TLS. Throws ConfigError for files that cannot be read, or that do not fit together. */
export function createSecureServer(settings: TlsSettings, options: ServerOptions, handler: RequestListener): Server {
  const isMutual = settings.tls_client_ca !== ''
  const mutual = { requestCert: isMutual, rejectUnauthorized: isMutual }
  return createServer({ ...options, ...readCredentials(settings), ...mutual }, handler)
}

/**
 * Reads the files again; answers what has new connections see them. Throws ConfigError where they cannot be used.
 */
export function renewal(server: Server, settings: TlsSettings): () => void {
  if (!(server instanceof SecureServer)) return () => {}
  const credentials = readCredentials(settings)
  return () => server.setSecureContext(credentials)
}

/** Hands a server a connection that needs no TLS, such as one of a Unix socket. */
export function takePlain(server: Server, socket: Socket): void {
  // Of a server with TLS this is what comes after the handshake.
  server.emit(server instanceof SecureServer ? 'secureConnection' : 'connection', socket)
}

/** The files of the settings. Throws ConfigError where a server could not use them. */
export function readCredentials({ tls_cert, tls_key, tls_client_ca }: TlsSettings): Credentials {
  const credentials = {
    cert: read('tls_cert', tls_cert),
    key: read('tls_key', tls_key),
    ...(tls_client_ca !== '' && { ca: read('tls_client_ca', tls_client_ca) }),
  }
  try {
    createSecureContext(credentials)
    return credentials
  } catch (error) {
    throw new ConfigError(`tls_cert '${tls_cert}' and tls_key '${tls_key}' cannot be used: ${errorText(error)}`)
  }
}

function read(setting: string, path: string): Buffer {
  try {
    return readFileSync(path)
  } catch (error) {
    throw new ConfigError(`${setting} '${path}' cannot be read: ${errorText(error)}`)
  }
}
