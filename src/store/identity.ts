import { FORMAT, type GroupRecord, seal, UnreadableError, unseal } from './checkpoint/manifest.js'

/** What a run remembers beside its checkpoints: how often it was opened, and groups that a connection gave anew. */
export type Identity = { run: string; epoch: number; replacement?: Replacement | undefined }

/**
 * Groups that were given when `step` was the last finished one: for the next step, and those for the steps after
 * that.
 */
export type Replacement = { step: number; groups: GroupRecord[]; later?: GroupRecord[] }

/** The text of a run's `run.json`. */
export function sealIdentity({ run, epoch, replacement }: Identity): string {
  return seal({ format: FORMAT, run, epoch, replacement })
}

/** Reads it, for the run whose folder it lies in. Throws UnreadableError, also where it is of another run. */
export function openIdentity(text: string, file: string, name: string): Identity {
  const { run, epoch, replacement }: Record<string, unknown> = { ...unseal(text, file) }
  const of = (what: string, value: unknown, expected: string) =>
    new UnreadableError(`${file}: ${what} is ${JSON.stringify(value)}, expected ${expected}`)
  // Two folders, or two ways to one, must not become two runs: each would take the other's files for its own.
  if (run !== name) throw of('run', run, `'${name}' as its folder is called`)
  if (!isCount(epoch)) throw of('epoch', epoch, 'a count')
  if (replacement === undefined) return { run: name, epoch }
  if (!isReplacement(replacement)) throw of('replacement', replacement, 'a step and groups')
  return { run: name, epoch, replacement }
}

function isReplacement(value: unknown): value is Replacement {
  if (!isMap(value)) return false
  const { step, groups, later } = value
  return isCount(step) && isGroups(groups) && (later === undefined || isGroups(later))
}

function isGroups(value: unknown): value is GroupRecord[] {
  return Array.isArray(value) && value.every(isGroup)
}

function isGroup(value: unknown): value is GroupRecord {
  if (!isMap(value)) return false
  const { name, algorithm, preset, given, hyperparameters } = value
  const named = typeof name === 'string' && typeof algorithm === 'string'
  return named && ['string', 'undefined'].includes(typeof preset) && isMap(given) && isMap(hyperparameters)
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && Number(value) >= 0
}

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
