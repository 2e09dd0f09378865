import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { type Bugs, CODE, type Code, NO_BUGS, type Subject } from './site.js'

/** A bug that the simulation has to find: one line of what is compiled of src/cluster is another one. */
type Mutation = { readonly file: 'whole' | 'vote' | 'recovery'; readonly from: string; readonly to: string }

export type Planted = { readonly name: string; readonly bug: Mutation | keyof Bugs }

const SOURCES = new URL('../../src/cluster/', import.meta.url)

export const PLANTED: readonly Planted[] = [
  { name: 'a put writes over what is there', bug: 'overwrites' },
  { name: 'an assignment is written without comparing', bug: 'swapsBlindly' },
  { name: 'a shard votes before its journal has the step', bug: 'votesEarly' },
  { name: 'a late copy opens a shard again', bug: 'opensAgain' },
  {
    name: 'the generation of a vote is not compared',
    bug: { file: 'whole', from: 'if (generation !== this.generation)', to: 'if (false)' },
  },
  {
    name: 'a vote that comes twice counts twice',
    bug: { file: 'whole', from: 'this.#votes.set(shard, vote)', to: 'this.#votes.set(this.#votes.size, vote)' },
  },
  {
    name: 'a head does not see that its commit was not written',
    bug: { file: 'whole', from: 'if (!isSameEntry(stands, entry))', to: 'if (false)' },
  },
  {
    name: 'a head that takes over does not close the log',
    bug: {
      file: 'whole',
      from: 'newest = await log.put(entryAfter(newest,',
      to: 'return new Whole(options, newest ?? entryAfter(newest,',
    },
  },
  {
    name: 'a head takes over though the log is closed to it',
    bug: { file: 'whole', from: 'newest.generation >= assignment.generation', to: 'false' },
  },
  {
    name: 'a head serves though another one has taken over',
    bug: { file: 'whole', from: 'newest.generation > this.generation', to: 'false' },
  },
  {
    name: 'a put whose answer was lost is never put again',
    bug: {
      file: 'whole',
      from: 'this.#committing = false;\n            this.#refuse(error)',
      to: 'this.#refuse(error)',
    },
  },
  {
    name: 'the whole goes back where a shard is one step ahead',
    bug: { file: 'recovery', from: 'step === at.step + 1', to: 'false' },
  },
  {
    name: 'the whole goes on though a shard has lost its last steps',
    bug: { file: 'recovery', from: 'step === at.step && digest === expected', to: 'true' },
  },
  {
    name: 'a shard that is ahead stays there, whatever the step',
    bug: { file: 'recovery', from: 'return { step: whole.step, back }', to: 'return { step: whole.step, back: [] }' },
  },
  {
    name: 'a checkpoint of any state counts',
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
