import assert from 'node:assert'
import { createHash } from 'node:crypto'
import { isBlockDtype } from '../../kernels/dtype.js'
import type { Device, SharedRegion } from '../device/device.js'
import type { Region } from '../device/region.js'
import { errorText } from '../errors.js'
import type { Member } from '../run/members/member.js'
import type { Run } from '../run/run.js'
import type { TransportAnswer, TransportOffer } from '../wire/frame.js'
import { mapMemory } from '../wire/shared-memory.js'
import { layOut, PROOF_BYTES } from '../wire/slots.js'

/** Both arenas of a client, mapped, and where the tensors of its run, or a member's parts of them, lie in them. */
export class SharedArenas {
  readonly #gradients: Arena
  readonly #updates: Arena

  constructor(gradients: Arena, updates: Arena) {
    this.#gradients = gradients
    this.#updates = updates
  }

  /** The slot of a parameter's gradient. The caller releases it. */
  gradient(parameter: number): Region {
    return this.#gradients.slot(parameter)
  }

  /** The slot of a parameter's update. The caller releases it. */
  update(parameter: number): Region {
    return this.#updates.slot(parameter)
  }

  /** The client is gone. The memory is unmapped when the last job that uses it has ended. */
  close(): void {
    this.#gradients.close()
    this.#updates.close()
  }
}

/** One arena with its slots. The whole of it lives as long as a slot does. */
class Arena {
  readonly #whole: Region
  readonly #sizes: readonly number[]
  readonly #offsets: readonly number[]

  constructor(whole: Region, sizes: readonly number[]) {
    this.#whole = whole
    this.#sizes = sizes
    this.#offsets = layOut(sizes).offsets
  }

  slot(index: number): Region {
    const whole = this.#whole.retain()
    return whole.carve(this.#offsets[index], this.#sizes[index], () => whole.release())
  }

  close(): void {
    this.#whole.release()
  }
}

/** Why an offer is not taken. Its text is told to the client. */
class Refusal extends Error {}

/** What a transport is agreed on for: a client that is `member` of a run; `local` says whether it is on this host. */
export type Agreement = { device: Device; run: Run; member: Member; local: boolean }

/**
 * Takes the first of a client's offers that works: its memory is mapped, and both sides prove that they see the same
 * bytes. Every offer that is not taken is answered with the reason, and with none of them the socket is the way.
 */
export function agree(
  offers: readonly TransportOffer[],
  agreement: Agreement,
): { arenas: SharedArenas | undefined; answer: TransportAnswer } {
  const refused: { kind: string; reason: string }[] = []
  for (const offer of offers) {
    const { kind } = offer
    try {
      return { arenas: take(offer, agreement), answer: { kind, refused } }
    } catch (error) {
      refused.push({ kind, reason: errorText(error) })
    }
  }
  return { arenas: undefined, answer: { kind: 'websocket', refused } }
}

function take(offer: TransportOffer, { device, run, member, local }: Agreement): SharedArenas {
  if (!local) throw new Refusal('the client is on another host: no memory is shared')
  if (offer.nonce.length !== PROOF_BYTES)
    throw new Refusal(`the nonce has ${offer.nonce.length} bytes, expected ${PROOF_BYTES}`)
  const { parameters } = run
  const inBlocks = parameters.find((one) => isBlockDtype(one.gradient_dtype) || isBlockDtype(one.update_dtype))
  if (inBlocks) throw new Refusal(`the tensors of parameter '${inBlocks.name}' travel in blocks, over the socket alone`)
  const sizes = [
    parameters.map((parameter) => member.gradient(parameter).bytes),
    parameters.map((parameter) => member.update(parameter).bytes),
  ]
  const regions: SharedRegion[] = []
  try {
    for (const [i, bytes] of sizes.map((sizes) => layOut(sizes).bytes).entries())
      regions.push(map(offer, i, { device, run, bytes }))
    prove(offer.nonce, regions, device)
  } catch (error) {
    for (const { region } of regions) region.release()
    throw error
  }
  const [gradients, updates] = regions.map(({ region }, i) => new Arena(region, sizes[i]))
  return new SharedArenas(gradients, updates)
}

/** Maps one of the two arenas: 0 is that of gradients, 1 that of updates. */
function map(
  { kind, process, descriptors = [], gpu, handles = [] }: TransportOffer,
  which: number,
  { device, run, bytes }: { device: Device; run: Run; bytes: number },
): SharedRegion {
  if (kind === 'shm') {
    const descriptor = descriptors[which]
    if (process === undefined || descriptor === undefined) throw new Refusal('shm needs process and two descriptors')
    return device.shareHost(mapMemory(process, descriptor, bytes))
  }
  if (kind !== 'cuda-ipc') throw new Refusal(`this service does not know the transport '${kind}'`)
  const handle = handles[which]
  if (gpu === undefined || handle === undefined) throw new Refusal('cuda-ipc needs gpu and two handles')
  if (run.intake.gathers)
    throw new Refusal(
      'the run has members, whose parts come together in memory of the host: they may share that, as shm',
    )
  const { sharing, name } = device.backend
  if (sharing === undefined) throw new Refusal(`the service computes on ${name}, without kernels that share memory`)
  /* c8 ignore start -- needs a GPU: npm run test:gpu */
  return mapGpu(handle, { device, run, bytes, unit: sharing.unitOf(gpu), gpu })
}

type OnGpu = { device: Device; run: Run; bytes: number; unit: number | undefined; gpu: string }

function mapGpu(handle: Uint8Array, { device, run, bytes, unit, gpu }: OnGpu): SharedRegion {
  if (unit === undefined) throw new Refusal(`the client's GPU ${gpu} is none of the service's (${device.backend.name})`)
  const elsewhere = run.parameters.find((_, i) => run.grant.units[i] !== unit)
  if (elsewhere) throw new Refusal(`parameter '${elsewhere.name}' is computed on another GPU than the client's`)
  const shared = device.shareGpu(unit, handle)
  if (shared.region.bytes >= bytes) return shared
  shared.region.release()
  throw new Refusal(`the shared memory has ${shared.region.bytes} bytes, expected are ${bytes} or more`)
}
/* c8 ignore stop */

/** Reads the nonce where the client has put it, and answers with its SHA-256 at the start of the other arena. */
function prove(nonce: Uint8Array, [gradients, updates]: readonly SharedRegion[], device: Device): void {
  assert(gradients && updates, 'both arenas are mapped')
  const seen = device.readShared(gradients, PROOF_BYTES)
  if (Buffer.compare(seen, nonce) !== 0)
    throw new Refusal("the memory that was mapped does not begin with the nonce: it is not the client's")
  device.writeShared(updates, createHash('sha256').update(nonce).digest())
}
