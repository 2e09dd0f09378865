// Ends with 0 while the service accepts steps. It asks the Unix socket where there is one: where clients need certificates
// (mutual TLS) a probe has none, and the port cannot be asked. Whose certificate the loopback shows is not looked at.
import { once } from 'node:events'
import { request as httpRequest } from 'node:http'
import { request as httpsRequest } from 'node:https'

const { MUOND_PORT: port = '8787', MUOND_SOCKET: socketPath, MUOND_TLS_CERT: certificate } = process.env
if (process.env.MUOND_TLS_CLIENT_CA && !socketPath)
  throw new Error(
    'with MUOND_TLS_CLIENT_CA the port asks for a certificate: set MUOND_SOCKET, such as /run/muond/muond.sock',
  )
const [request, scheme] = certificate && !socketPath ? [httpsRequest, 'https'] : [httpRequest, 'http']
const options = { ...(socketPath && { socketPath }), rejectUnauthorized: false }
const [response] = await once(request(`${scheme}://127.0.0.1:${port}/readyz`, options).end(), 'response')
const text = Buffer.concat(await response.toArray()).toString()
/* c8 ignore next -- a service that drains */
if (response.statusCode !== 200) throw new Error(`readyz answers ${response.statusCode}: ${text}`)
