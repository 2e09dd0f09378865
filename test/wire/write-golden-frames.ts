import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { encode, GOLDEN_FRAMES, jsonOf } from './golden-frames.js'

/** Writes docs/frames anew: `npm run frames`. */

for (const folder of new Set(GOLDEN_FRAMES.map(({ path }) => dirname(path)))) {
  rmSync(folder, { recursive: true, force: true })
  mkdirSync(folder, { recursive: true })
}
for (const { path, frame } of GOLDEN_FRAMES) {
  const bytes = encode(frame)
  writeFileSync(`${path}.msgpack`, bytes)
  writeFileSync(`${path}.json`, jsonOf(bytes))
}
