import { createHash } from 'node:crypto'
import { announcementOf } from '../announcement.js'
import type { Versioned } from '../coordinator.js'
import { type Announcement, announced, type Key, type Registry, ReplacedError } from '../registry.js'
import type { KubernetesClient, Lease, LeaseVersion } from './client.js'
import { Renewals } from './renewals.js'

/** The API takes 256 KiB of annotations of one object, their names among them. */
const MOST_BYTES = 250_000
/** A process that has not renewed for so many lengths of a lease is not paused but gone, and its Lease is removed. */
const LENGTHS_KEPT = 20
const KIND = 'muond/kind'
const PEERS = `${KIND}=peer`

/**
 * Leases and values as Leases of Kubernetes (coordination.k8s.io/v1) in one namespace, so that a Role for leases is
 * all that a process needs. The Lease of a process has what it says of itself in annotations; a value is an annotation
 * of a Lease without a holder. Its version is `uid` and `resourceVersion`, which the API compares in each PUT and
 * DELETE.
 *
 * Kubernetes ends no lease: whoever reads it judges (`Renewals`). `renewTime` is written for people and not read,
 * because it is by the clock of another machine.
 */
export class KubernetesRegistry implements Registry {
  readonly name: string
  readonly mostBytes = MOST_BYTES
  readonly #client: KubernetesClient
  readonly #lease_seconds: number
  readonly #renewals = new Renewals()
  /**
   * The Lease of this process as it wrote it last: once announced, it does not take its place back from another one.
   */
  #mine: Lease | undefined

  constructor(client: KubernetesClient, lease_seconds: number) {
    this.name = `kubernetes:${client.namespace}`
    this.#client = client
    this.#lease_seconds = lease_seconds
  }

  async renew(own: Announcement): Promise<readonly Announcement[]> {
    const others = await announced(own, () => this.#announce(own))
    return [...(await this.#living(others)), own]
  }

  async leave(): Promise<void> {
    if (this.#mine) await this.#client.remove(this.#mine.metadata.name, versionOf(this.#mine))
  }

  async read({ kind, run }: Key): Promise<Versioned<string> | undefined> {
    const lease = await this.#client.get(nameOf(kind, run))
    return lease && { value: lease.metadata.annotations?.['muond/value'] ?? '', version: textOf(versionOf(lease)) }
  }

  async write({ kind, run }: Key, content: string, version: string | undefined): Promise<boolean> {
    const metadata = {
      name: nameOf(kind, run),
      labels: { [KIND]: kind },
      annotations: { 'muond/run': run, 'muond/value': content },
    }
    const lease = { metadata, spec: {} }
    const written = await (version === undefined
      ? this.#client.create(lease)
      : this.#client.replace(lease, versionIn(version)))
    return written !== undefined
  }

  remove({ kind, run }: Key, version: string): Promise<boolean> {
    return this.#client.remove(nameOf(kind, run), versionIn(version))
  }

  /** Answers the Leases of all others; undefined where its own was written by another process meanwhile. */
  async #announce(own: Announcement): Promise<readonly Lease[] | undefined> {
    const leases = await this.#client.list(PEERS)
    const lease = this.#leaseOf(own)
    const found = leases.find(({ metadata }) => metadata.name === lease.metadata.name)
    const isOthers = found !== undefined && found.spec.holderIdentity !== holderOf(own)
    if (isOthers && this.#mine) throw new ReplacedError()
    const written = await (found ? this.#client.replace(lease, versionOf(found)) : this.#client.create(lease))
    /* c8 ignore next -- another process comes between a reading and a writing */
    if (written === undefined) return undefined
    this.#mine = written
    return leases.filter((each) => each !== found)
  }

  #leaseOf(own: Announcement): Lease {
    const annotations = {
      'muond/url': own.url,
      'muond/free-bytes': String(own.free_bytes),
      'muond/device': own.device,
    }
    return {
      metadata: { name: nameOf('peer', own.url), labels: { [KIND]: 'peer' }, annotations },
      spec: {
        holderIdentity: holderOf(own),
        leaseDurationSeconds: this.#lease_seconds,
        renewTime: new Date().toISOString().replace('Z', '000Z'),
      },
    }
  }

  /** The processes that renew their leases; of those that are long gone the Leases are removed. */
  async #living(leases: readonly Lease[]): Promise<readonly Announcement[]> {
    const lengths = this.#renewals.see(
      leases.map((lease) => {
        const { leaseDurationSeconds = this.#lease_seconds } = lease.spec
        return { name: lease.metadata.name, version: textOf(versionOf(lease)), lease_seconds: leaseDurationSeconds }
      }),
    )
    for (const lease of leases.filter((_, i) => lengths[i] > LENGTHS_KEPT))
      await this.#client.remove(lease.metadata.name, versionOf(lease))
    return leases.filter((_, i) => lengths[i] < 1).map((lease) => this.#announcementOf(lease))
  }

  #announcementOf({ metadata: { name, annotations = {} }, spec }: Lease): Announcement {
    const { 'muond/url': url = '', 'muond/free-bytes': bytes, 'muond/device': device } = annotations
    const incarnation = spec.holderIdentity?.slice(url.length + 1)
    return announcementOf({ url, incarnation, device, free_bytes: Number(bytes) }, `${this.name}: Lease ${name}`)
  }
}

/** As `kubectl get leases` shows it. */
function holderOf({ url, incarnation }: Announcement): string {
  return `${url}_${incarnation}`
}

function versionOf({ metadata: { uid = '', resourceVersion = '' } }: Lease): LeaseVersion {
  return { uid, resourceVersion }
}

function textOf({ uid, resourceVersion }: LeaseVersion): string {
  return `${uid}/${resourceVersion}`
}

function versionIn(text: string): LeaseVersion {
  const [uid, resourceVersion] = text.split('/')
  return { uid, resourceVersion }
}

/** A name of Kubernetes has lower-case letters, digits and '-' only; names of runs and urls have more. */
function nameOf(kind: Key['kind'] | 'peer', what: string): string {
  return `muond-${kind}-${createHash('sha256').update(what).digest('hex').slice(0, 32)}`
}
