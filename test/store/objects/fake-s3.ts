import { createHash, randomUUID } from 'node:crypto'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'

/** How a store of the past broke its conditional writes: what is asked for is done although the condition fails. */
export type Broken = { absent?: boolean; unchanged?: boolean; forgets?: boolean }

type Stored = { bytes: Buffer; etag: string }
type Started = { key: string; parts: Map<number, Stored> }

/** A list has so few entries, so that its readers have to ask for the next page. */
const PAGE = 3

/**
 * As much of S3 as the service asks for, in memory: what the tests of `npm test` run against. The real thing is
 * SeaweedFS, against which the same tests run in `test/objects/ci.sh`.
 */
export class FakeS3 {
  readonly objects = new Map<string, Stored>()
  readonly uploads = new Map<string, Started>()
  readonly server: Server
  broken: Broken = {}

  constructor() {
    this.server = createServer((request, response) => {
      void this.#answer(request, response)
    })
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const pieces: Buffer[] = []
    for await (const piece of request) pieces.push(piece)
    const url = new URL(request.url!, 'http://s3')
    const [, bucket, ...rest] = url.pathname.split('/')
    const key = decodeURIComponent(rest.join('/'))
    const call = { method: request.method!, key, query: url.searchParams, headers: request.headers }
    const { status, body = '', headers = {} } = this.#handle(bucket!, call, Buffer.concat(pieces))
    response.writeHead(status, { 'content-length': Buffer.byteLength(body), ...headers })
    response.end(request.method === 'HEAD' ? undefined : body)
  }

  #handle(bucket: string, { method, key, query, headers }: Call, body: Buffer): Answer {
    if (bucket !== BUCKET) return problem(404, 'NoSuchBucket')
    if (method === 'GET' && query.has('uploads')) return this.#listUploads(query)
    if (method === 'GET' && key === '') return this.#list(query)
    if (query.has('uploads')) return this.#begin(key)
    const source = headers['x-amz-copy-source']
    const copied = source === undefined ? undefined : this.#copied(String(source), headers)
    if (source !== undefined && copied === undefined) return problem(404, 'NoSuchKey')
    if (query.has('uploadId')) return this.#upload(method, key, { query, body: copied ?? body })
    if (method === 'PUT') return this.#put(key, copied ?? body, headers)
    if (method === 'DELETE') {
      this.objects.delete(key)
      return { status: 204 }
    }
    return this.#get(key, headers.range)
  }

  #get(key: string, range: string | undefined): Answer {
    const found = this.objects.get(key)
    if (found === undefined) return problem(404, 'NoSuchKey')
    const { bytes, etag } = found
    const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(range ?? '') ?? []
    if (from === undefined) return { status: 200, body: bytes, headers: { etag } }
    return { status: 206, body: bytes.subarray(Number(from), Number(to) + 1), headers: { etag } }
  }

  /** The bytes that a copy names; undefined where there are none. */
  #copied(source: string, headers: IncomingMessage['headers']): Buffer | undefined {
    const [, ...key] = source.split('/').map(decodeURIComponent)
    const range = headers['x-amz-copy-source-range']
    const { status, body } = this.#get(key.join('/'), range === undefined ? undefined : String(range))
    return status < 400 && Buffer.isBuffer(body) ? body : undefined
  }

  #put(key: string, bytes: Buffer, headers: IncomingMessage['headers']): Answer {
    const found = this.objects.get(key)
    const { 'if-none-match': none, 'if-match': match } = headers
    if (none === '*' && found && !this.broken.absent) return problem(412, 'PreconditionFailed')
    if (match !== undefined && found?.etag !== match && !this.broken.unchanged)
      return found ? problem(412, 'PreconditionFailed') : problem(404, 'NoSuchKey')
    const kept = this.broken.forgets ? Buffer.from('other') : bytes
    this.objects.set(key, { bytes: kept, etag: etagOf(kept) })
    return { ...xml('CopyObjectResult', `<ETag>${etagOf(bytes)}</ETag>`), headers: { etag: etagOf(bytes) } }
  }

  #list(query: URLSearchParams): Answer {
    const after = query.get('continuation-token') ?? query.get('start-after') ?? ''
    const keys = [...this.objects.keys()].filter((key) => key.startsWith(query.get('prefix')!) && key > after).sort()
    const page = keys.slice(0, PAGE)
    const next = keys.length > PAGE ? `<NextContinuationToken>${page.at(-1)}</NextContinuationToken>` : ''
    const contents = page.map((key) => `<Contents><Key>${key}</Key></Contents>`).join('')
    return xml('ListBucketResult', contents + next)
  }

  #listUploads(query: URLSearchParams): Answer {
    const after = query.get('upload-id-marker') ?? ''
    const ids = [...this.uploads].filter(([id, { key }]) => key.startsWith(query.get('prefix')!) && id > after)
    const sorted = ids.sort(([one], [other]) => (one < other ? -1 : 1))
    const page = sorted.slice(0, PAGE)
    const [last] = page.at(-1) ?? []
    const more = `<IsTruncated>${sorted.length > PAGE}</IsTruncated><NextKeyMarker>k</NextKeyMarker><NextUploadIdMarker>${last}</NextUploadIdMarker>`
    const uploads = page.map(([id, { key }]) => `<Upload><Key>${key}</Key><UploadId>${id}</UploadId></Upload>`)
    return xml('ListMultipartUploadsResult', uploads.join('') + more)
  }

  #begin(key: string): Answer {
    const id = randomUUID()
    this.uploads.set(id, { key, parts: new Map() })
    return xml('InitiateMultipartUploadResult', `<UploadId>${id}</UploadId>`)
  }

  #upload(method: string, key: string, { query, body }: { query: URLSearchParams; body: Buffer }): Answer {
    const id = query.get('uploadId')!
    const upload = this.uploads.get(id)
    if (upload === undefined) return problem(404, 'NoSuchUpload')
    const etag = etagOf(body)
    if (method === 'PUT') {
      upload.parts.set(Number(query.get('partNumber')), { bytes: body, etag })
      return { ...xml('CopyPartResult', `<ETag>${etag}</ETag>`), headers: { etag } }
    }
    this.uploads.delete(id)
    if (method === 'DELETE') return { status: 204 }
    const named = [...String(body).matchAll(/<PartNumber>(\d+)</g)].map(
      ([, number]) => upload.parts.get(Number(number))!,
    )
    const bytes = Buffer.concat(named.map((part) => part.bytes))
    this.objects.set(key, { bytes, etag: etagOf(bytes) })
    return xml('CompleteMultipartUploadResult', `<ETag>${etagOf(bytes)}</ETag>`)
  }
}

export const BUCKET = 'muond-test'

type Call = { method: string; key: string; query: URLSearchParams; headers: IncomingMessage['headers'] }
type Answer = { status: number; body?: string | Buffer; headers?: Record<string, string> }

const etagOf = (bytes: Buffer) => `"${createHash('md5').update(bytes).digest('hex')}"`
const xml = (name: string, inside: string): Answer => ({
  status: 200,
  headers: { 'content-type': 'application/xml' },
  body: `<?xml version="1.0" encoding="UTF-8"?><${name}>${inside}</${name}>`,
})
const problem = (status: number, code: string): Answer => {
  return { ...xml('Error', `<Code>${code}</Code><Message>${code} it is</Message>`), status }
}
