import { hostname } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'
import { FORMAT, held, seal, unseal } from '../checkpoint/manifest.js'
import { bool, count, natural, type Rule, record, text } from '../rules.js'
import type { Objects, StoredObject, Version } from './objects.js'

/** The object that says which service has the store. */
const OWNER = 'owner.json'

/**
 * Who has the store: `generation` is one more with every service that takes it, `beat` with every sign of life.
 * `released`: nobody, that service has ended.
 */
type OwnerRecord = { format: number; generation: number; beat: number; holder: string; released: boolean }

const rule: Rule<OwnerRecord> = record<OwnerRecord>({
  format: count,
  generation: natural,
  beat: count,
  holder: text(),
  released: bool,
})

/** A sign of life so many times in the seconds after which one without is taken to be dead. */
const BEATS = 3
const LOOKS = 15

type OwnerTimes = {
  /** How long a start waits for another service that is alive. */
  readonly wait_seconds: number
  /** Without a sign of life for so long a service is taken to be dead. */
  readonly lease_seconds: number
}

/**
 * That this service has the store. Its signs of life keep others from taking it. What makes it safe is not them but the
 * generation: whoever takes the store has a higher one, and with it takes each run by a conditional write, so that
 * nothing of one that was only believed to be dead counts from there on.
 */
export class Owner {
  readonly generation: number
  readonly #objects: Objects
  readonly #timer: NodeJS.Timeout
  #record: OwnerRecord
  #version: Version
  #problem: string | undefined
  readonly #leaseMs: number
  /** When the store has last taken a sign of life. */
  #heardAt = performance.now()
  #beating: Promise<void> | undefined
  #lost = false
  /** Called once when another service has taken the store. */
  onLost: ((reason: string) => void) | undefined

  /**
   * Takes the store. Waits until a service that gives no sign of life is taken to be dead, and at most `wait_seconds`
   * for one that is alive. Throws ConfigError that names the holder, and StoreError.
   */
  static async take(objects: Objects, times: OwnerTimes): Promise<Owner> {
    const holder = `process ${process.pid} on ${hostname()} since ${new Date().toISOString()}`
    const deadline = performance.now() + times.wait_seconds * 1000
    let seen: { version: Version; at: number } | undefined
    for (;;) {
      const found = await objects.get(OWNER)
      const before = found && openOwner(objects, found)
      const now = performance.now()
      const isDead =
        seen !== undefined && seen.version === found?.version && now - seen.at >= times.lease_seconds * 1000
      if (found === undefined || before?.released || isDead) {
        const generation = (before?.generation ?? 0) + 1
        const next = { format: FORMAT, generation, beat: 0, holder, released: false }
        const version = await write(objects, next, found?.version)
        if (version !== undefined) return new Owner(objects, times, { record: next, version })
        seen = undefined
        continue
      }
      if (seen !== undefined && seen.version !== found.version && now >= deadline)
        throw new ConfigError(
          `data store '${objects.name}' is in use by ${before?.holder}: one service at a time writes to it`,
        )
      if (seen?.version !== found.version) seen = { version: found.version, at: now }
      await delay((times.lease_seconds * 1000) / LOOKS)
    }
  }

  private constructor(objects: Objects, times: OwnerTimes, of: { record: OwnerRecord; version: Version }) {
    this.#objects = objects
    this.#record = of.record
    this.#version = of.version
    this.generation = of.record.generation
    this.#leaseMs = times.lease_seconds * 1000
    this.#timer = setInterval(() => this.#beat(), this.#leaseMs / BEATS).unref()
  }

  /** Why the store cannot be written to, as of the last sign of life; undefined where it can. */
  get problem(): string | undefined {
    const silence = performance.now() - this.#heardAt
    if (this.#problem !== undefined || silence < this.#leaseMs) return this.#problem
    return `it has not answered for ${Math.floor(silence / 1000)} seconds`
  }

  /** Lets another service take the store at once. */
  async release(): Promise<void> {
    clearInterval(this.#timer)
    await this.#beating
    if (!this.#lost) await write(this.#objects, { ...this.#record, released: true }, this.#version)
  }

  #beat(): void {
    this.#beating ??= this.#signal()
      .catch((error) => {
        this.#problem = errorText(error)
      })
      .finally(() => {
        this.#beating = undefined
      })
  }

  async #signal(): Promise<void> {
    const next = { ...this.#record, beat: this.#record.beat + 1 }
    const version = (await write(this.#objects, next, this.#version)) ?? (await this.#versionOfOurs())
    if (version === undefined) return
    this.#record = next
    this.#version = version
    this.#problem = undefined
    this.#heardAt = performance.now()
  }

  /** A write whose answer was lost has left another version of ours; anything else is another service's. */
  async #versionOfOurs(): Promise<Version | undefined> {
    const found = await this.#objects.get(OWNER)
    const record = found && openOwner(this.#objects, found)
    if (found && record?.generation === this.generation) return found.version
    this.#lost = true
    this.#problem = `it was taken by ${record?.holder ?? 'somebody who has removed owner.json'}`
    clearInterval(this.#timer)
    this.onLost?.(this.#problem)
    return undefined
  }
}

/** Who has the store, or had it last; undefined where nobody ever has. Throws ConfigError. */
export async function holderOfObjects(objects: Objects): Promise<Pick<OwnerRecord, 'holder' | 'released'> | undefined> {
  const found = await objects.get(OWNER)
  return found && openOwner(objects, found)
}

function write(objects: Objects, record: OwnerRecord, version: Version | undefined): Promise<Version | undefined> {
  const bytes = Buffer.from(seal(record))
  return version === undefined ? objects.putIfAbsent(OWNER, bytes) : objects.putIfUnchanged(OWNER, bytes, version)
}

function openOwner({ name }: Objects, { bytes }: StoredObject): OwnerRecord {
  const file = `${name}/${OWNER}`
  try {
    return held(rule, unseal(bytes.toString(), file), file)
  } catch (error) {
    throw new ConfigError(errorText(error))
  }
}
