import { setTimeout as delay } from 'node:timers/promises'
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CopyObjectCommand,
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  type GetObjectCommandOutput,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectsV2Command,
  NoSuchBucket,
  PutObjectCommand,
  S3Client,
  S3ServiceException,
  UploadPartCommand,
  UploadPartCopyCommand,
} from '@aws-sdk/client-s3'
import { errorText } from '../../../errors.js'
import type { StoreSample } from '../../../metrics.js'
import { type Objects, type StoredObject, StoreError, type Unfinished, type Upload, type Version } from '../objects.js'
import type { ObjectsAddress } from '../open-objects.js'
import { withEach } from '../with-each.js'
import { type CopyRequests, copyObject } from './s3-copy.js'
import { type PartRequests, S3Upload } from './s3-upload.js'

/** Where objects lie in S3. Credentials and what is empty here are found as by every program with the AWS SDK. */
export type S3Address = {
  readonly kind: 's3'
  readonly bucket: string
  /** Before every key: '' or a path that ends with '/'. */
  readonly prefix: string
  readonly endpoint: string
  readonly region: string
  readonly path_style: boolean
}

/** A request is tried so often: about 5 seconds of waiting where the store says that it is busy (SlowDown, 503). */
const ATTEMPTS = 5
const CONNECT_MS = 5000
/** Without a byte for so long a request is given up, and tried again. */
const SILENCE_MS = 20_000
const REST_MS = 200
const DELETES_AT_A_TIME = 8

/** Objects of an S3 bucket, or of another store that speaks its protocol and keeps its conditional writes. */
export class S3Objects implements Objects {
  readonly name: string
  readonly #client: S3Client
  readonly #address: S3Address
  readonly #observe: (sample: StoreSample) => void
  readonly #copy_bytes: number | undefined

  /** `copy_bytes`: what has more is copied in parts; undefined is as much as a store copies in a few seconds. */
  constructor(address: S3Address, observe: (sample: StoreSample) => void, copy_bytes?: number) {
    this.#copy_bytes = copy_bytes
    const { bucket, prefix, endpoint, region, path_style } = address
    this.name = `s3://${bucket}/${prefix}`.replace(/\/$/, '')
    this.#address = address
    this.#observe = observe
    this.#client = new S3Client({
      ...(endpoint && { endpoint }),
      ...(region && { region }),
      forcePathStyle: path_style,
      maxAttempts: ATTEMPTS,
      requestHandler: { connectionTimeout: CONNECT_MS, socketTimeout: SILENCE_MS },
      // Every content has a SHA-256 of ours; many stores do not know the checksums that are newer than S3's first ones.
      requestChecksumCalculation: 'WHEN_REQUIRED',
      responseChecksumValidation: 'WHEN_REQUIRED',
    })
  }

  async get(key: string): Promise<StoredObject | undefined> {
    const ask = () => this.#client.send(new GetObjectCommand(this.#of(key)))
    return this.#read(key, ask, async ({ Body, ETag }, count) => {
      /* c8 ignore next -- a store that answers with success has both */
      if (Body === undefined || ETag === undefined) throw new Error('the answer has no content or no ETag')
      const bytes = Buffer.from(await Body.transformToByteArray())
      count(bytes.length)
      return { bytes, version: ETag }
    }).catch(absent)
  }

  async size(key: string): Promise<number | undefined> {
    const head = () => this.#client.send(new HeadObjectCommand(this.#of(key)))
    return this.#ask('get', key, async () => (await head()).ContentLength).catch(absent)
  }

  /** What a cut connection has brought is kept, and the next request asks for the rest. */
  async readInto(memory: Uint8Array, key: string, at: number): Promise<void> {
    let done = 0
    const ask = () => {
      const Range = `bytes=${at + done}-${at + memory.length - 1}`
      return this.#client.send(new GetObjectCommand({ ...this.#of(key), Range }))
    }
    await this.#read(key, ask, async ({ Body }, count) => {
      /* c8 ignore next -- a store that answers with success has it */
      if (Body === undefined) throw new Error('the answer has no content')
      for await (const piece of Body as AsyncIterable<Uint8Array>) {
        memory.set(piece, done)
        done += piece.length
        count(piece.length)
      }
      if (done < memory.length) throw new Error(`the answer ends after ${done} of ${memory.length} bytes`)
    })
  }

  async put(key: string, bytes: Uint8Array): Promise<void> {
    await this.#put(key, bytes, {})
  }

  async putIfAbsent(key: string, bytes: Uint8Array): Promise<Version | undefined> {
    return this.#put(key, bytes, { IfNoneMatch: '*' }).catch((error) => this.#unlessOurs(error, key, bytes))
  }

  async putIfUnchanged(key: string, bytes: Uint8Array, version: Version): Promise<Version | undefined> {
    return this.#put(key, bytes, { IfMatch: version }).catch((error) => this.#unlessOurs(error, key, bytes))
  }

  async *list(prefix: string, after?: string): AsyncGenerator<string> {
    const { bucket: Bucket, prefix: before } = this.#address
    const StartAfter = after && before + after
    for (let token: string | undefined, more = true; more; ) {
      const command = new ListObjectsV2Command({
        Bucket,
        Prefix: before + prefix,
        StartAfter,
        ContinuationToken: token,
      })
      const { Contents = [], NextContinuationToken } = await this.#ask('list', prefix, () => this.#client.send(command))
      for (const { Key } of Contents) if (Key !== undefined) yield Key.slice(before.length)
      token = NextContinuationToken
      more = token !== undefined
    }
  }

  async copyFrom(place: ObjectsAddress, from: string, to: string): Promise<boolean> {
    /* c8 ignore next -- the places of a cluster are of one kind */
    if (place.kind !== 's3') throw new StoreError(`${this.name}: ${from} cannot be copied from a folder`)
    const source = { Bucket: place.bucket, Key: place.prefix + from }
    const head = () => this.#client.send(new HeadObjectCommand(source))
    const bytes = await this.#ask('get', from, async () => (await head()).ContentLength).catch(absent)
    if (bytes === undefined) return false
    const requests = this.#copying(`${source.Bucket}/${source.Key}`.split('/').map(encodeURIComponent).join('/'), to)
    const copied = copyObject(requests, bytes, this.#copy_bytes).then(() => true)
    return (await copied.catch(absent)) ?? false
  }

  async delete(keys: readonly string[]): Promise<void> {
    await withEach(keys, DELETES_AT_A_TIME, async (key) => {
      const command = new DeleteObjectCommand(this.#of(key))
      await this.#ask('delete', key, () => this.#client.send(command))
    })
  }

  upload(key: string, bytes: number): Upload {
    const of = this.#of(key)
    return new S3Upload(
      {
        ...this.#parts(key),
        put: (content) => this.put(key, content),
        part: async (UploadId, PartNumber, Body) => {
          const command = new UploadPartCommand({ ...of, UploadId, PartNumber, Body })
          const { ETag } = await this.#ask('upload', key, () => this.#client.send(command), Body.length)
          return expected(ETag, 'ETag')
        },
      },
      bytes,
    )
  }

  async *unfinished(prefix: string): AsyncGenerator<Unfinished> {
    const { bucket: Bucket, prefix: before } = this.#address
    let from: { KeyMarker?: string; UploadIdMarker?: string } | undefined = {}
    while (from) {
      const command: ListMultipartUploadsCommand = new ListMultipartUploadsCommand({
        Bucket,
        Prefix: before + prefix,
        ...from,
      })
      const { Uploads = [], ...page } = await this.#ask('list', prefix, () => this.#client.send(command))
      for (const { Key, UploadId } of Uploads)
        if (Key !== undefined && UploadId !== undefined) yield { key: Key.slice(before.length), id: UploadId }
      from = page.IsTruncated ? { KeyMarker: page.NextKeyMarker, UploadIdMarker: page.NextUploadIdMarker } : undefined
    }
  }

  async abort({ key, id }: Unfinished): Promise<void> {
    const command = new AbortMultipartUploadCommand({ ...this.#of(key), UploadId: id })
    await this.#ask('delete', key, () => this.#client.send(command)).catch(absent)
  }

  #copying(CopySource: string, to: string): CopyRequests {
    const of = this.#of(to)
    const ask = <T>(work: () => Promise<T>) => this.#ask('copy', to, work)
    return {
      ...this.#parts(to),
      whole: async () => {
        await ask(() => this.#client.send(new CopyObjectCommand({ ...of, CopySource })))
      },
      part: async (UploadId, PartNumber, { begin, end }) => {
        const CopySourceRange = `bytes=${begin}-${end - 1}`
        const command = new UploadPartCopyCommand({ ...of, UploadId, PartNumber, CopySource, CopySourceRange })
        return expected((await ask(() => this.#client.send(command))).CopyPartResult?.ETag, 'ETag')
      },
    }
  }

  /** The requests of an object in parts but for the parts. */
  #parts(key: string): Pick<PartRequests, 'begin' | 'complete' | 'abort'> {
    const of = this.#of(key)
    const ask = <T>(work: () => Promise<T>) => this.#ask('upload', key, work)
    return {
      begin: async () => {
        const { UploadId } = await ask(() => this.#client.send(new CreateMultipartUploadCommand(of)))
        return expected(UploadId, 'UploadId')
      },
      complete: async (UploadId, parts) => {
        const Parts = parts.map(({ number, etag }) => ({ PartNumber: number, ETag: etag }))
        const command = new CompleteMultipartUploadCommand({ ...of, UploadId, MultipartUpload: { Parts } })
        await ask(() => this.#client.send(command))
      },
      abort: (id) => this.abort({ key, id }),
    }
  }

  #of(key: string): { Bucket: string; Key: string } {
    return { Bucket: this.#address.bucket, Key: this.#address.prefix + key }
  }

  async #put(key: string, Body: Uint8Array, condition: { IfMatch?: string; IfNoneMatch?: string }): Promise<Version> {
    const command = new PutObjectCommand({ ...this.#of(key), ...condition, Body })
    return expected((await this.#ask('put', key, () => this.#client.send(command), Body.length)).ETag, 'ETag')
  }

  /**
   * The end of a conditional write that was refused. An attempt whose answer was lost may have written: then the object
   * has these bytes.
   */
  async #unlessOurs(error: unknown, key: string, bytes: Uint8Array): Promise<Version | undefined> {
    if (!isRefused(error)) throw error
    const found = await this.get(key)
    return found?.bytes.equals(bytes) ? found.version : undefined
  }

  /** One request, which the SDK tries again. Throws StoreError. */
  async #ask<T>(operation: StoreSample['operation'], key: string, work: () => Promise<T>, bytes = 0): Promise<T> {
    return this.#observed(operation, key, async (count) => {
      const answer = await work()
      count(bytes)
      return answer
    })
  }

  /**
   * A request whose answer has content. The SDK tries again until there is an answer; where the connection is cut while
   * `read` takes the content, all of it is tried again here.
   */
  async #read<T>(
    key: string,
    ask: () => Promise<GetObjectCommandOutput>,
    read: (answer: GetObjectCommandOutput, count: (bytes: number) => void) => Promise<T>,
  ): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      let isAnswered = false
      try {
        return await this.#observed('get', key, async (count) => {
          const answer = await ask()
          isAnswered = true
          return read(answer, count)
        })
      } catch (error) {
        if (!isAnswered || attempt === ATTEMPTS) throw error
        await delay(REST_MS * 2 ** attempt * Math.random())
      }
    }
  }

  async #observed<T>(
    operation: StoreSample['operation'],
    key: string,
    work: (count: (bytes: number) => void) => Promise<T>,
  ): Promise<T> {
    const begun = performance.now()
    let bytes = 0
    const ended = (failed: boolean) => {
      this.#observe({ operation, seconds: (performance.now() - begun) / 1000, bytes, failed })
    }
    try {
      const answer = await work((more) => {
        bytes += more
      })
      ended(false)
      return answer
    } catch (error) {
      ended(!isRefused(error))
      throw new StoreError(`${this.name}: ${operation} ${key}: ${textOf(error)}`, { cause: error })
    }
  }
}

/** Precondition failed; another conditional write is under way; or the object to be unchanged is gone. */
const REFUSED: ReadonlySet<number> = new Set([404, 409, 412])

/** Whether an answer is no fault of the store. */
function isRefused(error: unknown): boolean {
  return REFUSED.has(statusOf(error) ?? 0) && !lacksBucket(error)
}

function lacksBucket(error: unknown): boolean {
  return sourceOf(error) instanceof NoSuchBucket
}

function sourceOf(error: unknown): unknown {
  return error instanceof StoreError ? error.cause : error
}

function statusOf(error: unknown): number | undefined {
  const source = sourceOf(error)
  return source instanceof S3ServiceException ? source.$metadata.httpStatusCode : undefined
}

/** What S3 calls an error, and what it says of it; never with the credentials, which no error of the SDK has. */
function textOf(error: unknown): string {
  if (!(error instanceof S3ServiceException)) return errorText(error)
  const { name, message, $metadata } = error
  return `${$metadata.httpStatusCode} ${name}: ${message}`
}

/** The end of a request for something that need not be there. */
function absent(error: unknown): undefined {
  if (statusOf(error) === 404 && !lacksBucket(error)) return undefined
  throw error
}

function expected(value: string | undefined, name: string): string {
  if (value !== undefined) return value
  /* c8 ignore next 2 -- a store that answers with success has these */
  throw new StoreError(`the store's answer has no ${name}`)
}
