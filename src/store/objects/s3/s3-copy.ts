import { withEach } from '../with-each.js'
import type { PartRequests } from './s3-upload.js'

/**
 * What a copy asks of S3, which reads the source and writes the bytes by itself. `part` copies the bytes `begin` to
 * `end` of the source, without the last one.
 */
export type CopyRequests = Pick<PartRequests, 'begin' | 'complete' | 'abort'> & {
  whole(): Promise<void>
  part(upload: string, number: number, bytes: { begin: number; end: number }): Promise<string>
}

/** A store copies so much in a few seconds; without an answer for longer a request is given up. */
const PART_BYTES = 256 << 20
const PARTS_AT_A_TIME = 8

/** Copies an object of `bytes` bytes: one of more than `most` in parts of so many. */
export async function copyObject(requests: CopyRequests, bytes: number, most = PART_BYTES): Promise<void> {
  if (bytes <= most) return requests.whole()
  const upload = await requests.begin()
  try {
    const numbers = Array.from({ length: Math.ceil(bytes / most) }, (_, i) => i + 1)
    const parts: { number: number; etag: string }[] = []
    await withEach(numbers, PARTS_AT_A_TIME, async (number) => {
      const range = { begin: (number - 1) * most, end: Math.min(number * most, bytes) }
      parts[number - 1] = { number, etag: await requests.part(upload, number, range) }
    })
    await requests.complete(upload, parts)
  } catch (error) {
    await requests.abort(upload).catch(() => undefined)
    throw error
  }
}
