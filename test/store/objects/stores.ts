import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import {
  type ClientRequest,
  createServer,
  type IncomingMessage,
  request,
  type Server,
  type ServerResponse,
} from 'node:http'
import type { AddressInfo, Socket } from 'node:net'
import { CreateBucketCommand, S3Client } from '@aws-sdk/client-s3'
import type { Test } from 'tap'
import type { S3Address } from '../../../src/store/objects/s3/s3-objects.js'
import { BUCKET, FakeS3 } from './fake-s3.js'

// The SDK takes credentials where every program with it does. SeaweedFS is started with these.
process.env.AWS_ACCESS_KEY_ID ??= 'muond'
process.env.AWS_SECRET_ACCESS_KEY ??= 'muond-secret'
process.env.AWS_SDK_JS_NODE_VERSION_SUPPORT_WARNING_DISABLED = 'true'

/** The store of `test/objects/ci.sh`; without one, tests have a fake in memory. */
const REAL = process.env.TEST_S3_ENDPOINT

/** A request on its way to the store. */
export type Passing = { method: string; key: string; query: URLSearchParams; range: string | undefined }
/**
 * What happens to a request: `busy` is S3's SlowDown, `denied` is an error that is not tried again, `conflict` says that
 * another conditional write is under way, `cut` loses it, `lost` its answer, `half` the second half of its answer; a
 * promise holds it back.
 */
export type Fault = 'busy' | 'denied' | 'conflict' | 'cut' | 'lost' | 'half' | Promise<unknown> | undefined

const error = (code: string, message: string) => `<Error><Code>${code}</Code><Message>${message}</Message></Error>`
const REFUSALS = {
  busy: { status: 503, body: error('SlowDown', 'Please reduce your request rate.') },
  denied: { status: 403, body: error('AccessDenied', 'Access Denied.') },
  conflict: { status: 409, body: error('ConditionalRequestConflict', 'Another one is under way.') },
}

/** A store that tests share, behind a proxy that does to its requests what a test wants. */
export class TestStore {
  readonly fake: FakeS3 | undefined
  readonly #server: Server
  readonly #target: string
  readonly #sockets = new Set<Socket>()
  /** Whether requests are refused at once, as where there is no server. */
  down = false
  fault: (passing: Passing) => Fault = () => undefined
  readonly passed: Passing[] = []

  /** Starts a fake, or reaches for the real one. It ends with the test. */
  static async start(t: Test): Promise<TestStore> {
    /* c8 ignore next -- with a real store the other side runs */
    const fake = REAL === undefined ? new FakeS3() : undefined
    fake?.server.listen(0, '127.0.0.1')
    if (fake) await once(fake.server, 'listening')
    const target = REAL ?? `http://127.0.0.1:${(fake!.server.address() as AddressInfo).port}`
    const store = await new TestStore(target, fake).#listen(t)
    /* c8 ignore next 5 -- needs a real store: npm run test:objects */
    if (REAL) {
      const client = new S3Client({ endpoint: REAL, region: 'us-east-1', forcePathStyle: true })
      await client.send(new CreateBucketCommand({ Bucket: BUCKET })).catch(() => undefined)
      client.destroy()
    }
    return store
  }

  private constructor(target: string, fake: FakeS3 | undefined) {
    this.#target = target
    this.fake = fake
    this.#server = createServer((incoming, answer) => void this.#pass(incoming, answer))
    this.#server.on('connection', (socket) => {
      this.#sockets.add(socket)
      socket.once('close', () => this.#sockets.delete(socket))
    })
  }

  /** Another way to the same store. */
  another(t: Test): Promise<TestStore> {
    return new TestStore(this.#target, undefined).#listen(t)
  }

  async #listen(t: Test): Promise<TestStore> {
    this.#server.listen(0, '127.0.0.1')
    await once(this.#server, 'listening')
    t.teardown(() => this.#close())
    return this
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`
  }

  /** A place of its own in the store, or one that was used before. */
  address(prefix = `${randomUUID()}/`): S3Address {
    return { kind: 's3', bucket: BUCKET, prefix, endpoint: this.endpoint, region: 'us-east-1', path_style: true }
  }

  /** The settings of a service that has its runs there. */
  settings({ prefix }: S3Address, lease = 1) {
    return {
      data: `s3://${BUCKET}/${prefix}`,
      ...{ s3_endpoint: this.endpoint, s3_region: 'us-east-1', s3_path_style: true, s3_lease_seconds: lease },
    }
  }

  async #pass(incoming: IncomingMessage, answer: ServerResponse): Promise<void> {
    const { pathname, searchParams: query } = new URL(incoming.url!, 'http://s3')
    const key = decodeURIComponent(pathname.split('/').slice(2).join('/'))
    const passing = { method: incoming.method!, key, query, range: incoming.headers.range }
    this.passed.push(passing)
    const fault = this.down ? 'cut' : this.fault(passing)
    if (fault === 'cut') return void incoming.socket.destroy()
    if (fault === 'busy' || fault === 'denied' || fault === 'conflict') {
      const { status, body } = REFUSALS[fault]
      incoming.resume()
      answer.writeHead(status, { 'content-type': 'application/xml', connection: 'close' })
      return void answer.end(body)
    }
    await fault
    const { method, headers } = incoming
    const onward = request(`${this.#target}${incoming.url}`, { method, headers })
    onward.on('error', () => incoming.socket.destroy())
    incoming.pipe(onward)
    await this.#answer(onward, answer, fault)
  }

  async #answer(onward: ClientRequest, answer: ServerResponse, fault: Fault): Promise<void> {
    const [{ statusCode, headers }, body] = await new Promise<[IncomingMessage, Buffer]>((resolve) => {
      onward.once('response', (response: IncomingMessage) => {
        const pieces: Buffer[] = []
        response.on('data', (piece) => pieces.push(piece))
        response.once('end', () => resolve([response, Buffer.concat(pieces)]))
      })
    })
    if (fault === 'lost') return void answer.destroy()
    answer.writeHead(statusCode!, headers)
    if (fault !== 'half') return void answer.end(body)
    answer.write(body.subarray(0, body.length >> 1), () => answer.destroy())
  }

  async #close(): Promise<void> {
    this.#server.close()
    for (const socket of this.#sockets) socket.destroy()
    this.fake?.server.close()
    this.fake?.server.closeAllConnections()
  }
}
