import type { Upload } from '../objects.js'

/** What an upload in parts asks of S3. */
export type PartRequests = {
  put(bytes: Uint8Array): Promise<void>
  begin(): Promise<string>
  part(upload: string, number: number, bytes: Uint8Array): Promise<string>
  complete(upload: string, parts: readonly { number: number; etag: string }[]): Promise<void>
  abort(upload: string): Promise<void>
}

/** S3 takes parts of 5 MiB or more, the last one excepted, and at most 10,000 of an object. */
const LEAST_PART_BYTES = 8 << 20
const MOST_PARTS = 10_000
/** So many parts are under way at a time, and one more is being filled: that is all the memory of an upload. */
const PARTS_UNDER_WAY = 3

/** An object in parts, each of which is tried again by itself; one that fits into a part is one request. */
export class S3Upload implements Upload {
  readonly #requests: PartRequests
  readonly #partBytes: number
  readonly #free: Uint8Array[] = []
  readonly #underWay = new Set<Promise<void>>()
  readonly #parts: { number: number; etag: string }[] = []
  #part: Uint8Array
  #filled = 0
  #next = 1
  #upload: Promise<string> | undefined
  #failure: { error: unknown } | undefined
  #ended = false

  constructor(requests: PartRequests, bytes: number) {
    this.#requests = requests
    this.#partBytes = Math.max(LEAST_PART_BYTES, Math.ceil(bytes / MOST_PARTS))
    this.#part = new Uint8Array(Math.min(this.#partBytes, bytes))
  }

  async write(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length; ) {
      if (this.#filled === this.#part.length) await this.#send()
      const taken = bytes.subarray(at, at + this.#part.length - this.#filled)
      this.#part.set(taken, this.#filled)
      this.#filled += taken.length
      at += taken.length
    }
  }

  async end(): Promise<void> {
    const rest = this.#part.subarray(0, this.#filled)
    if (this.#upload === undefined) await this.#requests.put(rest)
    else await this.#complete(await this.#upload, rest)
    this.#ended = true
  }

  async abort(): Promise<void> {
    await Promise.allSettled(this.#underWay)
    const upload = await this.#upload?.catch(() => undefined)
    if (upload !== undefined && !this.#ended) await this.#requests.abort(upload)
  }

  async #complete(upload: string, rest: Uint8Array): Promise<void> {
    this.#begin(upload, rest)
    await Promise.all(this.#underWay)
    if (this.#failure) throw this.#failure.error
    await this.#requests.complete(
      upload,
      this.#parts.toSorted((one, other) => one.number - other.number),
    )
  }

  /** Sends the part that is full, and takes memory for the next one. */
  async #send(): Promise<void> {
    this.#upload ??= this.#requests.begin()
    const upload = await this.#upload
    while (this.#underWay.size >= PARTS_UNDER_WAY) await Promise.race(this.#underWay)
    if (this.#failure) throw this.#failure.error
    this.#begin(upload, this.#part)
    this.#part = this.#free.pop() ?? new Uint8Array(this.#partBytes)
    this.#filled = 0
  }

  #begin(upload: string, bytes: Uint8Array): void {
    const number = this.#next++
    const sent = this.#requests
      .part(upload, number, bytes)
      .then(
        (etag) => void this.#parts.push({ number, etag }),
        (error) => {
          this.#failure ??= { error }
        },
      )
      .finally(() => {
        this.#underWay.delete(sent)
        this.#free.push(bytes)
      })
    this.#underWay.add(sent)
  }
}
