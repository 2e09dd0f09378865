import { ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'
import type { StoreSample } from '../../metrics.js'
import { CheckpointFiles } from '../checkpoint/checkpoint-files.js'
import { UnreadableError } from '../checkpoint/manifest.js'
import type { DataStore } from '../data-store.js'
import { RunStore } from '../run-store.js'
import { type ObjectsAddress, openObjects } from './open-objects.js'
import { Owner } from './owner.js'
import { probe } from './probe.js'
import { type ObjectsMeans, RunObjects } from './run-objects.js'
import { withEach } from './with-each.js'

export type DataObjectsOptions = {
  readonly wait_seconds: number
  readonly lease_seconds: number
  /** Hears of every request to the store. */
  readonly observe: (sample: StoreSample) => void
  /** Where each process of a cluster has its runs, by its URL; undefined where there is no cluster. */
  readonly placeOf?: (origin: string) => ObjectsAddress
}

/** All runs as objects: those of each below `runs/`, and `owner.json`, which keeps other services out. */
export class DataObjects implements DataStore {
  readonly names: readonly string[]
  readonly lost: Promise<string>
  readonly adopt: DataStore['adopt']
  readonly #owner: Owner
  readonly #means: ObjectsMeans
  /** The runs that were made or read. */
  readonly #runs = new Map<string, RunObjects>()

  /**
   * Opens a store and takes it for this service. Throws ConfigError where it cannot be reached or written to, where its
   * conditional writes are none, or another service has it.
   */
  static async open(address: ObjectsAddress, options: DataObjectsOptions): Promise<DataObjects> {
    const objects = await openObjects(address, options.observe)
    try {
      await probe(objects)
      const owner = await Owner.take(objects, options)
      const files = new CheckpointFiles(options.observe)
      let number = 0
      const means = { objects, address, files, generation: owner.generation, number: () => ++number }
      const names = await namesOf(means).catch(async (error) => {
        await files.close()
        await owner.release()
        throw error
      })
      return new DataObjects(means, owner, { names, options })
    } catch (error) {
      if (error instanceof ConfigError) throw error
      throw new ConfigError(`data store '${objects.name}' cannot be used: ${errorText(error)}`)
    }
  }

  private constructor(
    means: ObjectsMeans,
    owner: Owner,
    { names, options: { placeOf, observe } }: { names: readonly string[]; options: DataObjectsOptions },
  ) {
    this.#means = means
    this.#owner = owner
    this.names = names
    this.adopt =
      placeOf &&
      (async (run, from) => {
        const address = placeOf(from)
        return this.#anew(run).adopt({ objects: await openObjects(address, observe), address })
      })
    this.lost = new Promise((resolve) => {
      owner.onLost = resolve
    })
  }

  async problem(): Promise<string | undefined> {
    const { problem } = this.#owner
    return problem && `data store '${this.#means.objects.name}' cannot be written: ${problem}`
  }

  create(run: string): Promise<RunStore> {
    return RunStore.create(this.#anew(run), run)
  }

  find(run: string): Promise<RunStore> {
    return RunStore.open(this.#anew(run))
  }

  destroy(run: string): Promise<void> {
    return (this.#runs.get(run) ?? this.#anew(run)).destroy()
  }

  async close(): Promise<void> {
    await this.#means.files.close()
    // Without it the next start waits until the signs of life are missed.
    await this.#owner.release().catch(() => undefined)
  }

  #anew(run: string): RunObjects {
    const objects = new RunObjects(this.#means, run)
    this.#runs.set(run, objects)
    return objects
  }
}

const NAMES_AT_A_TIME = 16
const INDEX = /^runs\/([^/]+)\/run\.json$/

/** The runs that are there and not deleted. One whose `run.json` cannot be read is there. */
async function namesOf(means: ObjectsMeans): Promise<string[]> {
  const found: string[] = []
  for await (const key of means.objects.list('runs/')) {
    const [, name] = INDEX.exec(key) ?? []
    if (name !== undefined) found.push(name)
  }
  const names: string[] = []
  await withEach(found, NAMES_AT_A_TIME, async (name) => {
    if (await isThere(means, name)) names.push(name)
  })
  return names.sort()
}

async function isThere(means: ObjectsMeans, name: string): Promise<boolean> {
  try {
    return !(await new RunObjects(means, name).isDeleted())
  } catch (error) {
    if (error instanceof UnreadableError) return true
    throw error
  }
}
