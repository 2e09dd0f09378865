import { join } from 'node:path'
import type { MuondError } from '../../src/client/client.js'
import { type Disk, mountDisk, refusalToMount } from './disk.js'
import { LAST } from './model.js'
import { type Durability, Site } from './site.js'
import type { Case, Fault, Verdict } from './stage.js'
import type { Outcome, Trainer } from './trainer.js'
import { askAgain, type Decide, judgeUnwritable, takeCheckpoint } from './unwritable.js'

/** The bytes that are left on a full disk: fewer than a checkpoint needs. */
const ROOM_BYTES = 65_536

type Attempt = (site: Site, the: Case, disk: Disk) => Promise<Outcome>

const ATTEMPTS: readonly [aimed: string, attempt: Attempt][] = [
  ['room is made later', fillDuring],
  ['killed while full', fillAndKill],
  ['full before open', fillBefore],
]

/** A disk without room, a tmpfs of its own for each case. */
export function fullDisk(folder: string): Fault[] {
  const refused = refusalToMount(folder)
  const note = refused && `Not carried out: a tmpfs could not be mounted here (${refused}).`
  return (['journal', 'checkpoint'] as const).flatMap((durability) =>
    ATTEMPTS.map(([aimed, attempt], i): Fault => {
      return {
        ...{ fault: `disk full, ${durability}`, aimed, full: note ? 0 : 4, ...(note && { note }) },
        isQuick: i === (durability === 'journal' ? 0 : 1),
        attempt: (the) => onDisk(the, durability, attempt),
      }
    }),
  )
}

async function onDisk(the: Case, durability: Durability, attempt: Attempt): Promise<Verdict> {
  const { folder, reference } = the
  const disk = mountDisk(join(folder, 'disk'))
  let isLost = true
  try {
    const site = await Site.start({ folder, durability, data: join(disk.path, 'data') })
    const outcome = await attempt(site, the, disk).finally(() => site.close())
    const verdict = judgeUnwritable(outcome, reference, durability)
    isLost = verdict.result === 'lost'
    return verdict
  } finally {
    disk.remove(isLost ? join(folder, 'kept') : undefined)
  }
}

/** The disk is full from a random step on; the trainer is told of it, and makes room. */
function fillDuring(site: Site, the: Case, disk: Disk): Promise<Outcome> {
  const decide = (error: MuondError) => {
    if (error.code === 'STORAGE_FAILED') disk.clear()
    return askAgain(error)
  }
  return trainOn(site, the, { disk, decide })
}

/** As `fillDuring`, but the service is killed before there is room again: it has to come back at the same step. */
function fillAndKill(site: Site, the: Case, disk: Disk): Promise<Outcome> {
  let isKilled = false
  const decide = async (error: MuondError) => {
    if (error.code === 'STORAGE_FAILED' && !isKilled) {
      isKilled = true
      await site.kill()
      disk.clear()
      await site.start()
    }
    return askAgain(error)
  }
  return trainOn(site, the, { disk, decide })
}

/**
 * Trains on a disk that is full after a random step. The client does not retry the first refusal: the trainer has to be
 * told of it. Without a journal the trainer asks for checkpoints from there on.
 */
function trainOn(site: Site, the: Case, { disk, decide }: { disk: Disk; decide: Decide }): Promise<Outcome> {
  const step = 1 + Math.floor(the.random() * (LAST - 2))
  const onReceipt = async (finished: number, trainer: Trainer) => {
    if (finished === step && trainer.refusals.length === 0) disk.fill(Math.floor(the.random() * ROOM_BYTES))
    if (finished >= step && site.durability === 'checkpoint') await takeCheckpoint(trainer, decide)
  }
  return site.train('run', the.signal, { retries: 0, decide, onReceipt })
}

/** The disk is full before a run is opened, which is refused; then there is room. */
function fillBefore(site: Site, the: Case, disk: Disk): Promise<Outcome> {
  disk.fill(0)
  const decide = (error: MuondError) => {
    if (error.code === 'STORAGE_FAILED') disk.clear()
    return askAgain(error)
  }
  return site.train('run', the.signal, { retries: 0, decide })
}
