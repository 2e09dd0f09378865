import { type FSWatcher, readdirSync, watch } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import type { Remains } from './folder.js'
import type { Frame } from './frames.js'
import { gradientBytes, LAST } from './model.js'
import type { Meddle } from './proxy.js'
import type { Durability } from './site.js'

/** A kill: the step and phase that it is aimed at, and what was observed. */
export type Shot = {
  random: () => number
  /** The step that the kill is aimed at. */
  step: number
  /** The run's folder. */
  folder: string
  /** Seconds that an undisturbed run takes. */
  seconds: number
  /** kill -9. */
  strike: () => void
  struck: boolean
  /** Frames of the phase's answer that the service sent before it was gone. */
  answers: number
}

/** A phase of a step that kills are aimed at, from outside. */
export type Aim = {
  name: string
  durabilities: readonly Durability[]
  /** Gets every frame of both directions, from the start. */
  meddle?: (shot: Shot) => Meddle
  /** Called once the run is open and has its folder; returns a function that ends the watch. */
  watch?: (shot: Shot) => () => void
  /** The service is killed again while it comes back. */
  again?: true
  /** Whether the kill fell into the phase; left out where it always does. */
  fell?: (shot: Shot, remains: Remains & { restoring: boolean }) => boolean
}

const BOTH = ['journal', 'checkpoint'] as const
// About how long each phase takes: a kill falls at a random time in it.
const COMPUTE_MS = 5
const RECEIPT_MS = 6
const RENAME_MS = 1
const OPEN_MS = 60
/** How many files a checkpoint has before its manifest, with the flags of a site. */
const CHECKPOINT_FILES = 10

const isUnanswered = ({ answers }: Shot) => answers === 0

export const AIMS: readonly Aim[] = [
  { name: 'open', durabilities: BOTH, meddle: open, fell: isUnanswered },
  { name: 'receive', durabilities: BOTH, meddle: receive },
  { name: 'compute', durabilities: BOTH, meddle: compute, fell: isUnanswered },
  { name: 'receipt', durabilities: BOTH, meddle: receipt },
  {
    name: 'checkpoint write',
    durabilities: BOTH,
    watch: checkpointWrite,
    fell: (_, { checkpointUnfinished, manifestUnnamed }) => checkpointUnfinished && !manifestUnnamed,
  },
  { name: 'rename', durabilities: BOTH, watch: rename, fell: (_, { manifestUnnamed }) => manifestUnnamed },
  {
    name: 'journal append',
    durabilities: ['journal'],
    watch: journalAppend,
    fell: (_, { journalTail }) => journalTail,
  },
  { name: 'any time', durabilities: BOTH, watch: anyTime },
  { name: 'restore', durabilities: BOTH, watch: anyTime, again: true, fell: (_, { restoring }) => restoring },
]

/** After the client's `open`. */
function open(shot: Shot): Meddle {
  const { random, strike } = shot
  return async ({ frame, label, direction, link }) => {
    if (label?.type === 'opened') shot.answers += 1
    if (label?.type !== 'open' || direction === 'down') return [frame.bytes]
    await link.write(direction, frame.bytes)
    await pause(random() * OPEN_MS)
    strike()
    return []
  }
}

/** After some bytes of the step's gradients. */
function receive({ random, step, strike }: Shot): Meddle {
  const most = 1 + Math.floor(random() * (gradientBytes(step) - 1))
  let passed = 0
  return async ({ frame, label, direction, link }) => {
    if (direction === 'down' || label?.type !== 'gradient' || label.step !== step) return [frame.bytes]
    passed += dataBytes(frame)
    if (passed < most) return [frame.bytes]
    await link.write(direction, frame.bytes.subarray(0, frame.bytes.length - (passed - most)))
    await pause(random() * COMPUTE_MS)
    strike()
    return []
  }
}

/** After the last byte of the step's gradients, which come at once, and before the first update. */
function compute(shot: Shot): Meddle {
  const { random, step, strike } = shot
  const held: Buffer[] = []
  let left = gradientBytes(step)
  return async ({ frame, label, direction, link }) => {
    if (label?.step !== step) return [frame.bytes]
    if (direction === 'down') shot.answers += label.type === 'update' ? 1 : 0
    if (direction === 'down' || label.type !== 'gradient') return [frame.bytes]
    held.push(frame.bytes)
    left -= dataBytes(frame)
    if (left > 0) return []
    await link.write(direction, Buffer.concat(held))
    await pause(random() * COMPUTE_MS)
    strike()
    return []
  }
}

/** The client sends a gradient's keys and its data as two fragments. */
function dataBytes({ opcode, payload }: Frame): number {
  return opcode === 0 ? payload.length : 0
}

/** After the step's `end`; the receipt does not reach the client. */
function receipt({ random, step, strike }: Shot): Meddle {
  return async ({ frame, label, direction, link }) => {
    if (label?.step !== step) return [frame.bytes]
    if (label.type === 'receipt') return []
    if (label.type !== 'end' || direction === 'down') return [frame.bytes]
    await link.write(direction, frame.bytes)
    await pause(random() * RECEIPT_MS)
    strike()
    return []
  }
}

/** When a checkpoint's folder has some of its files. */
function checkpointWrite({ random, folder, strike }: Shot): () => void {
  const files = Math.floor(random() * CHECKPOINT_FILES)
  return watchCheckpoints(folder, 1 + Math.floor(random() * 3), (names) => {
    if (names.length >= files) strike()
  })
}

/** When a checkpoint has a manifest that is not renamed yet. */
function rename({ random, folder, strike }: Shot): () => void {
  return watchCheckpoints(folder, 1 + Math.floor(random() * 3), async (names) => {
    if (!names.includes('manifest.json.new')) return
    await pause(random() * RENAME_MS)
    strike()
  })
}

/** When the journal grows the nth time. */
function journalAppend({ random, folder, strike }: Shot): () => void {
  let left = 1 + Math.floor(random() * 6 * LAST)
  const watcher = watch(join(folder, 'journal'), () => {
    left -= 1
    if (left === 0) strike()
  })
  return () => watcher.close()
}

function anyTime({ random, seconds, strike }: Shot): () => void {
  const timer = setTimeout(strike, random() * seconds * 1000)
  return () => clearTimeout(timer)
}

/** Calls back with the files of the `which`th new checkpoint, whenever one more of them appears. */
function watchCheckpoints(folder: string, which: number, seen: (names: string[]) => void): () => void {
  const checkpoints = join(folder, 'checkpoints')
  const known = new Set(readdirSync(checkpoints))
  const watchers: FSWatcher[] = []
  const follow = (path: string) => {
    const look = () => seen(namesIn(path))
    watchers.push(watch(path, look))
    // The checkpoints that were there before the watch began.
    look()
  }
  watchers.push(
    watch(checkpoints, (_, name) => {
      if (name === null || known.has(name)) return
      known.add(name)
      which -= 1
      if (which === 0) follow(join(checkpoints, name))
    }),
  )
  return () => {
    for (const watcher of watchers) watcher.close()
  }
}

/** The names in a folder; none where the folder has been removed meanwhile. */
function namesIn(path: string): string[] {
  try {
    return readdirSync(path)
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return []
    throw error
  }
}

/** Waits, exact to a fraction of a millisecond: a timer is exact to one, so the rest is a busy loop. */
export async function pause(milliseconds: number): Promise<void> {
  const until = performance.now() + milliseconds
  if (milliseconds >= 1) await delay(Math.floor(milliseconds))
  while (performance.now() < until);
}
