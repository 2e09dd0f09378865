import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, extname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { gzipSync } from 'node:zlib'
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { ServiceError } from '../../errors.js'

const FOLDER = fileURLToPath(new URL('../../../../ui', import.meta.url))
/** The charts' library, as its package has it. */
const CHARTS = ['uplot/dist/uPlot.iife.min.js', 'uplot/dist/uPlot.min.css']
const START = 'index.html'

const TYPES: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.svg': 'image/svg+xml',
}

/**
 * The page runs its own files and nothing else, sends to its own service only, and lies in no frame: it holds a key.
 * uPlot and the table place elements through the object model, which needs no style attribute.
 */
const HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cache-control': 'no-cache',
  vary: 'accept-encoding',
}

type Asset = { type: string; tag: string; plain: Buffer; gzip: Buffer }

/**
 * Serves the dashboard at `/ui`, and the files that it needs below. Neither needs a key: a browser cannot send one for
 * a page, and nothing of a run is in them.
 */
export async function ui(scope: FastifyInstance): Promise<void> {
  const assets = readAssets()
  const config = { access: 'open' } as const
  const send = (request: FastifyRequest, reply: FastifyReply, name: string) => {
    const asset = assets.get(name)
    if (asset === undefined) throw new ServiceError('NOT_FOUND', `the dashboard has no file '${name}'`)
    return answer(asset, request, reply)
  }
  scope.get('/ui', { config }, (request, reply) => send(request, reply, START))
  // The page names its files and the service's operations relative to `/`, wherever a proxy may have put that.
  scope.get('/ui/', { config }, (_request, reply) => reply.redirect('../ui', 308))
  scope.get<{ Params: { file: string } }>('/ui/:file', { config }, (request, reply) =>
    send(request, reply, request.params.file),
  )
}

function answer({ type, tag, plain, gzip }: Asset, { headers }: FastifyRequest, reply: FastifyReply): FastifyReply {
  reply.headers(HEADERS).header('etag', tag)
  if (headers['if-none-match'] === tag) return reply.code(304).send()
  reply.type(type)
  if (!/\bgzip\b/.test(headers['accept-encoding'] ?? '')) return reply.send(plain)
  return reply.header('content-encoding', 'gzip').send(gzip)
}

function readAssets(): ReadonlyMap<string, Asset> {
  const { resolve } = createRequire(import.meta.url)
  const files = [...readdirSync(FOLDER).map((name) => join(FOLDER, name)), ...CHARTS.map((name) => resolve(name))]
  const served = files.filter((file) => extname(file) in TYPES)
  return new Map(served.map((file) => [basename(file), assetOf(file)]))
}

function assetOf(file: string): Asset {
  const plain = readFileSync(file)
  // A weak tag: both codings of a file have it.
  const tag = `W/"${createHash('sha256').update(plain).digest('base64url').slice(0, 16)}"`
  return { type: TYPES[extname(file)], tag, plain, gzip: gzipSync(plain) }
}
