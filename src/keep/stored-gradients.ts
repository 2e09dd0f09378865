import assert from 'node:assert'
import type { Region } from '../device/region.js'
import type { RunStaging } from '../device/run-staging.js'
import type { Parameter } from '../optimizer/parameter.js'
import { withMeanGradient } from '../run/step/mean-demands.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import type { OpenFile } from '../store/file-bytes.js'
import type { StoredGradient } from '../store/journal/journal-reader.js'

/** Reads gradients of a journal into memory of the device. It keeps the files open that it opens, until `close`. */
export class StoredGradients {
  readonly #staging: RunStaging
  readonly #opened = new Map<string, Promise<OpenFile>>()
  readonly #given: ReadonlyMap<string, OpenFile>

  /** `given` are files, by their paths, that are open already: they stay their opener's. */
  constructor(staging: RunStaging, given: ReadonlyMap<string, OpenFile> = new Map()) {
    this.#staging = staging
    this.#given = given
  }

  /**
   * The gradient of a parameter, once there is room for it; the caller releases it. Throws UnreadableError where it has
   * another number of bytes than the parameter's gradients have.
   */
  async read(stored: StoredGradient, parameter: Parameter): Promise<Region> {
    const { at, bytes, applied } = stored
    const { name, gradient_bytes } = applied.contributors ? withMeanGradient(parameter) : parameter
    if (gradient_bytes !== bytes)
      throw new UnreadableError(`the gradient of parameter '${name}' has ${bytes} bytes, expected ${gradient_bytes}`)
    const region = await this.#staging.reserve(bytes, new AbortController().signal)
    assert(region, 'nothing aborts this')
    try {
      await readInto(region.view, await this.#open(stored), at)
      return region
      /* c8 ignore next 4 -- the file goes, or cannot be read, between its heads and its gradients */
    } catch (error) {
      region.release()
      throw error
    }
  }

  async close(): Promise<void> {
    for (const file of this.#opened.values()) await (await file).close()
  }

  #open({ path, open }: StoredGradient): OpenFile | Promise<OpenFile> {
    const file = this.#given.get(path) ?? this.#opened.get(path)
    if (file) return file
    const opened = open()
    this.#opened.set(path, opened)
    return opened
  }
}

/** A system reads at most 2 GiB at a time. What a file is too short for shows in the fingerprint. */
async function readInto(target: Uint8Array, file: OpenFile, at: number): Promise<void> {
  for (let done = 0, count = 1; done < target.length && count > 0; done += count) {
    count = (await file.read(target, done, target.length - done, at + done)).bytesRead
  }
}
