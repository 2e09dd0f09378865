import { draining, lostRun, notFinite, overloaded, receipt, reconnect, refused } from './faults.js'
import { cuts, ping, slow, unknown } from './liberties.js'
import type { Props, Scene } from './scene.js'

/** Every scene, in the order in which they are played: what no client should notice first, and last what may end it. */
export const SCENES: readonly ((props: Props) => Scene)[] = [
  ...[cuts, unknown, ping, slow],
  ...[reconnect, receipt, overloaded, refused, draining, notFinite, lostRun],
]

/** So many steps a client takes to meet them all: nothing happens in the first, and one comes after the last scene. */
export const STEPS_NEEDED = SCENES.length + 2
