import assert from 'node:assert'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import type { components } from '../../src/http/openapi.js'
import { train, trainStep } from '../run/trainer.js'
import { RawClient, type Service, until } from '../service.js'
import { start } from './data-folder.js'
import { type History, type Listed, RunModel } from './history.js'

const KEPT = 1
const MAX_RUNS = 3
const TAGS = ['best', 'last', 'early']
const DURABILITIES = ['checkpoint', 'journal'] as const

/** Numbers choose among what there is: a run, a checkpoint, a tag. */
const WHICH = fc.nat(1000)
const COMMAND = fc.oneof(
  { weight: 5, arbitrary: fc.record({ do: fc.constant('step' as const), which: WHICH, as: fc.nat(1) }) },
  {
    weight: 4,
    arbitrary: fc.record({ do: fc.constant('checkpoint' as const), which: WHICH, tag: fc.nat(2 * TAGS.length) }),
  },
  {
    weight: 4,
    arbitrary: fc.record({ do: fc.constant('go back' as const), which: WHICH, to: WHICH, byTag: fc.boolean() }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('restart' as const), which: WHICH }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('branch' as const), which: WHICH, to: WHICH }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('rest' as const), which: WHICH }) },
)
type Command = typeof COMMAND extends fc.Arbitrary<infer C> ? C : never

/** A service and what its runs must be. */
class World {
  readonly #models = new Map<string, RunModel>()
  /** The digest of each history, as it was seen first. */
  readonly #digests = new Map<string, string>()
  readonly #open: (data: string) => Promise<Service>
  readonly #data: string
  readonly #journal: boolean
  #service: Service | undefined

  constructor(data: string, durability: (typeof DURABILITIES)[number]) {
    this.#data = data
    this.#journal = durability === 'journal'
    this.#open = (folder) =>
      start(folder, { durability, checkpoint_steps: 0, checkpoints_kept: KEPT, max_runs: MAX_RUNS })
  }

  async begin(): Promise<void> {
    this.#service = await this.#open(this.#data)
    const { client, opened } = await train(this.#service, { run: 'r', last: 0 })
    await client.close()
    await this.#enter('r', [], opened.digest)
  }

  async end(): Promise<void> {
    await this.#service?.app.close()
  }

  async carryOut(t: Test, command: Command): Promise<void> {
    const names = [...this.#models.keys()]
    const name = names[command.which % names.length]!
    await this.#obey(t, name, command)
    // Of more runs than fit into memory some have left it, and nobody said which.
    if (this.#models.size > MAX_RUNS) await this.#restAll()
    await this.#check(t, name, command)
  }

  get #running(): Service {
    return this.#service!
  }

  #model(name: string): RunModel {
    return this.#models.get(name)!
  }

  async #obey(t: Test, name: string, command: Command): Promise<void> {
    const model = this.#model(name)
    switch (command.do) {
      case 'step': {
        const step = model.history.length + 1
        const history = [...model.history, step + 10 * command.as]
        const { digest } = await this.#connected(t, name, {}, (client) => trainStep(client, step, history.at(-1)))
        t.equal(this.#digest(history, digest), digest, 'a history has one digest')
        model.history = history
        return
      }
      case 'checkpoint': {
        const tag = TAGS[command.tag]
        const body = JSON.stringify(tag === undefined ? {} : { tag })
        const headers = { 'content-type': 'application/json' }
        const url = `${this.#running.http}/v1/runs/${name}/checkpoints`
        const answer = await fetch(url, { method: 'POST', body, headers })
        return model.take((await answer.json()) as Listed, tag)
      }
      case 'go back': {
        const names = command.byTag && model.tags.length > 0 ? model.tags : model.ids
        const checkpoint = names[command.to % names.length]!
        const target = model.find(checkpoint)!
        await this.#connected(t, name, { checkpoint }, async () => {})
        return model.goBack(target)
      }
      case 'restart': {
        await this.#running.app.close()
        if (!this.#journal) for (const each of this.#models.values()) each.fallBack()
        this.#service = await this.#open(this.#data)
        return this.#running.restored
      }
      case 'branch': {
        const checkpoint = model.ids[command.to % model.ids.length]!
        const { history } = model.find(checkpoint)!
        const run = `b${this.#models.size}`
        const client = await RawClient.connect(this.#running.url)
        const opened = await client.open({ run, from: { run: name, checkpoint } })
        t.equal(opened.digest, this.#digest(history))
        await client.close()
        return this.#enter(run, history, opened.digest)
      }
      case 'rest':
        return this.#restAll()
    }
  }

  async #connected<T>(
    t: Test,
    run: string,
    open: { checkpoint?: string },
    work: (client: RawClient) => Promise<T>,
  ): Promise<T> {
    const client = await RawClient.connect(this.#running.url)
    const { history } = open.checkpoint === undefined ? this.#model(run) : this.#model(run).find(open.checkpoint)!
    const opened = await client.open({ run, mode: 'resume', ...open })
    t.match(opened, { step: history.length, digest: this.#digest(history), ahead: [] })
    const result = await work(client)
    await client.close()
    await until(() => this.#running.runs.list().every(({ connected }) => !connected))
    return result
  }

  async #enter(run: string, history: History, digest: string): Promise<void> {
    this.#digest(history, digest)
    const model = new RunModel(KEPT, history)
    this.#models.set(run, model)
    const [first] = await this.#listed(run)
    model.take(first!)
    await until(() => this.#running.runs.list().every(({ connected }) => !connected))
  }

  /** Every run leaves memory, and takes a checkpoint of what the disk has not got. */
  async #restAll(): Promise<void> {
    await this.#running.runs.restIdle(performance.now() + 100 * 86_400_000)
    assert.deepEqual(this.#running.runs.list(), [])
    if (!this.#journal) for (const each of this.#models.keys()) await this.#learnNewest(each)
  }

  async #learnNewest(run: string): Promise<void> {
    const model = this.#model(run)
    if (model.hasCheckpoint) return
    const known = new Set(model.ids)
    const taken = (await this.#listed(run)).filter(({ checkpoint }) => !known.has(checkpoint))
    model.take(taken[0]!)
  }

  #digest(history: History, seen?: string): string {
    const key = history.join()
    const digest = this.#digests.get(key) ?? seen
    if (digest === undefined) throw new Error(`the history ${key} was never seen`)
    this.#digests.set(key, digest)
    return digest
  }

  async #listed(run: string): Promise<Listed[]> {
    const answer = await fetch(`${this.#running.http}/v1/runs/${run}/checkpoints`)
    return ((await answer.json()) as { checkpoints: Listed[] }).checkpoints
  }

  async #check(t: Test, name: string, command: Command): Promise<void> {
    const model = this.#model(name)
    const what = JSON.stringify(command)
    const listed = await this.#listed(name)
    t.same(
      listed.map(({ checkpoint, step, digest, tags, in_history }) => ({ checkpoint, step, digest, tags, in_history })),
      model.listed((history) => this.#digest(history)),
      what,
    )
    const answer = await fetch(`${this.#running.http}/v1/runs/${name}`)
    const { step, digest } = (await answer.json()) as components['schemas']['Run']
    t.same([step, digest], [model.history.length, this.#digest(model.history)], what)
  }
}

for (const durability of DURABILITIES) {
  t.test(
    `${durability}: whatever is done to runs, in any order, they and their checkpoints are what they must be`,
    async (t) => {
      let worlds = 0
      await fc.assert(
        fc.asyncProperty(fc.array(COMMAND, { minLength: 30, maxLength: 40 }), async (commands) => {
          const world = new World(`${t.testdir({})}/${worlds++}`, durability)
          try {
            await world.begin()
            for (const command of commands) await world.carryOut(t, command)
            if (!t.passing()) throw new Error(JSON.stringify(commands))
          } finally {
            await world.end()
          }
        }),
        { numRuns: 5, seed: 3, endOnFailure: true },
      )
    },
  )
}
