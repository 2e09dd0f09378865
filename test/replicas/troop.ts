import { bytesOfUpdate, Mate, type Model, type Split } from '../members/crew.js'

/** What every member of a run with replicas is opened with. */
export type TroopOptions = {
  model: Model
  split: Split
  replicas: number
  quorum?: { min_replicas: number; deadline_seconds: number }
  /** Whether the tensors of a member lie in shared memory, by its number among all; left out, of none. */
  shares?: readonly boolean[]
}

/** The members of a run with replicas, replica after replica; none is open yet. */
export function troopOf(url: string, run: string, { replicas, shares = [], ...options }: TroopOptions): Mate[][] {
  const world_size = options.split[0]!.length
  return Array.from({ length: replicas }, (_, replica) =>
    options.split[0]!.map((_, rank) => {
      const among = { replica, replicas }
      return new Mate(url, run, { ...options, rank, among, shares: shares[replica * world_size + rank] })
    }),
  )
}

export async function openTroop(url: string, run: string, options: TroopOptions): Promise<Mate[][]> {
  const troop = troopOf(url, run, options)
  for (const mate of troop.flat()) await mate.open()
  return troop
}

/** One replica sends a whole step. */
export function send(
  replica: readonly Mate[],
  step: number,
  { gradients, weight }: { gradients: readonly (Float32Array | Uint8Array)[]; weight?: number },
): void {
  for (const mate of replica) {
    for (const parameter of mate.own) mate.send(parameter, step, gradients[parameter]!)
    mate.end(step, undefined, weight)
  }
}

/** The receipts of all ranks. */
export function receipts(replica: readonly Mate[]) {
  return Promise.all(replica.map((mate) => mate.receipt()))
}

/** The whole updates that the ranks of a replica have together. */
export function updatesOf(replica: readonly Mate[], model: Model): Uint8Array[] {
  const updates = model.parameters.map((one) => new Uint8Array(bytesOfUpdate(one)))
  for (const mate of replica) mate.place(updates)
  return updates
}

export async function closeTroop(troop: readonly (readonly Mate[])[]): Promise<void> {
  for (const mate of troop.flat()) await mate.close()
}
