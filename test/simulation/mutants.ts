import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { type Bugs, CODE, type Code, NO_BUGS, type Subject } from './site.js'

/** A bug that the simulation has to find: one line of what is compiled of src/cluster is another one. */
type Mutation = { readonly file: 'whole' | 'vote' | 'recovery'; readonly from: string; readonly to: string }

/** `seed` is one whose schedule finds it. */
export type Planted = { readonly name: string; readonly seed: number; readonly bug: Mutation | keyof Bugs }

const SOURCES = new URL('../../src/cluster/', import.meta.url)

export const PLANTED: readonly Planted[] = [
  { name: 'a put writes over what is there', seed: 52, bug: 'overwrites' },
  { name: 'an assignment is written without comparing', seed: 6, bug: 'swapsBlindly' },
  { name: 'a shard votes before its journal has the step', seed: 2, bug: 'votesEarly' },
  { name: 'a late copy opens a shard again', seed: 18, bug: 'opensAgain' },
  {
    name: 'the generation of a vote is not compared',
    seed: 41,
    bug: { file: 'whole', from: 'if (generation !== this.generation)', to: 'if (false)' },
  },
  {
    name: 'a vote that comes twice counts twice',
    seed: 0,
    bug: { file: 'whole', from: 'this.#votes.set(shard, vote)', to: 'this.#votes.set(this.#votes.size, vote)' },
  },
  {
    name: 'a head does not see that its commit was not written',
    seed: 488,
    bug: { file: 'whole', from: 'if (!isSameEntry(stands, entry))', to: 'if (false)' },
  },
  {
    name: 'a head that takes over does not close the log',
    seed: 0,
    bug: {
      file: 'whole',
      from: 'newest = await log.put(entryAfter(newest,',
      to: 'return new Whole(options, entryAfter({ position: (newest?.position ?? 0) - 1 },',
    },
  },
  {
    name: 'a head takes over though the log is closed to it',
    seed: 102,
    bug: { file: 'whole', from: 'newest.generation >= assignment.generation', to: 'false' },
  },
  {
    name: 'a head serves though another one has taken over',
    seed: 23,
    bug: { file: 'whole', from: 'newest.generation > this.generation', to: 'false' },
  },
  {
    name: 'a head tells a digest that is not the whole’s',
    seed: 0,
    bug: { file: 'whole', from: 'return this.#newest.digest', to: "return 'another'" },
  },
  {
    name: 'a put whose answer was lost is never put again',
    seed: 21,
    bug: {
      file: 'whole',
      from: 'this.#committing = false;\n            this.#refuse(error)',
      to: 'this.#refuse(error)',
    },
  },
  {
    name: 'the whole goes back where a shard is one step ahead',
    seed: 36,
    bug: { file: 'recovery', from: 'step === at.step + 1', to: 'false' },
  },
  {
    name: 'the whole goes on though a shard has lost its last steps',
    seed: 24,
    bug: { file: 'recovery', from: 'step === at.step && digest === expected', to: 'true' },
  },
  {
    name: 'a shard that is ahead stays there, whatever the step',
    seed: 177,
    bug: { file: 'recovery', from: 'return { step: whole.step, back }', to: 'return { step: whole.step, back: [] }' },
  },
  {
    name: 'a checkpoint of any state counts',
    seed: 4911,
    bug: { file: 'recovery', from: '&& one.digest === shards[shard]', to: '' },
  },
]

/** The code with a bug in it; `folder` takes its files. */
export async function plant({ name, bug }: Planted, folder: string): Promise<Subject> {
  if (typeof bug === 'string') return { code: CODE, bugs: { ...NO_BUGS, [bug]: true } }
  const text = readFileSync(new URL(`${bug.file}.js`, SOURCES), 'utf8')
  const changed = text.replace(bug.from, bug.to)
  if (changed === text) throw new Error(`'${name}': ${bug.file}.js does not have '${bug.from}'`)
  mkdirSync(folder, { recursive: true })
  const file = join(folder, `${bug.file}.mjs`)
  writeFileSync(
    file,
    changed.replace(/from '(\.[^']+)'/g, (_, path: string) => `from '${new URL(path, SOURCES)}'`),
  )
  const code: Code = { ...CODE, ...(await import(pathToFileURL(file).href)) }
  return { code, bugs: NO_BUGS }
}
