import assert from 'node:assert'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type Manifest, openManifest, sealManifest } from '../../src/store/checkpoint/manifest.js'
import { startService } from '../service.js'

// What the tests of restarts do with a data folder, and with what lies in one.

/** A service that keeps its runs in `data`, a checkpoint of every fifth step in several files. */
export const start = (data: string, settings: Parameters<typeof startService>[0] = {}) =>
  startService({
    data,
    checkpoint_steps: 5,
    checkpoint_file_bytes: 2000,
    staging_bytes: 2 ** 20,
    lanes: 1,
    ...settings,
  })

export const runFolder = (data: string, run = 'r') => join(data, 'runs', run)
export const checkpoints = (data: string) => readdirSync(join(runFolder(data), 'checkpoints')).sort()
export const id = (step: number) => `step-${String(step).padStart(12, '0')}`
export const manifestOf = (data: string, step: number) =>
  join(runFolder(data), 'checkpoints', id(step), 'manifest.json')

export function stateFile(data: string): string {
  const folder = join(runFolder(data), 'checkpoints', id(5))
  return join(folder, readdirSync(folder).find((name) => name.startsWith('state-00001-of'))!)
}

export function flip(path: string, at: number): void {
  const bytes = readFileSync(path)
  bytes[at < 0 ? bytes.length + at : at]! ^= 1
  writeFileSync(path, bytes)
}

/** Puts other text in the place of what a file has there. */
export function rewrite(path: string, what: string | RegExp, other: string): void {
  const text = readFileSync(path, 'utf8')
  const changed = text.replace(what, other)
  assert.notEqual(changed, text, `${path} has no ${what}: ${text}`)
  writeFileSync(path, changed)
}

/** Another manifest, with a hash of its own that is right. */
export function reseal(data: string, change: Partial<Manifest> | ((manifest: Manifest) => Partial<Manifest>)): void {
  const path = manifestOf(data, 5)
  const manifest = openManifest(readFileSync(path, 'utf8'), path)
  writeFileSync(path, sealManifest({ ...manifest, ...(typeof change === 'function' ? change(manifest) : change) }))
}

export function copyFolder(from: string, to: string): void {
  mkdirSync(to, { recursive: true })
  for (const entry of readdirSync(from, { withFileTypes: true })) {
    if (entry.isDirectory()) copyFolder(join(from, entry.name), join(to, entry.name))
    else writeFileSync(join(to, entry.name), readFileSync(join(from, entry.name)))
  }
}
