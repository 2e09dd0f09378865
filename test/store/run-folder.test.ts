import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { openOnnxRuntime, viewMemory } from '../../src/device/onnx/onnxruntime.js'
import { CheckpointFiles } from '../../src/store/checkpoint/checkpoint-files.js'
import { openCheckpoint } from '../../src/store/checkpoint/checkpoint-source.js'
import { UnreadableError } from '../../src/store/checkpoint/manifest.js'
import { entryBytes, indexText, planShards, type StateEntry } from '../../src/store/checkpoint/state-files.js'
import { destroyRun, RunFolder } from '../../src/store/folder/run-folder.js'
import { RunStore } from '../../src/store/run-store.js'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { seeded } from '../reference.js'
import { inline, snapshot } from './snapshots.js'

const runtime = openOnnxRuntime()
const files = new CheckpointFiles()
t.teardown(() => files.close())

const nothing = () => {}
const create = (path: string) => RunStore.create(new RunFolder(path, files), 'r')
const open = ({ path }: { path: string }) => RunStore.open(new RunFolder(path, files))
const start = (t: Test) => create(join(t.testdir({}), 'r'))
const ids = ({ checkpoints }: RunStore) => checkpoints.map(({ checkpoint }) => checkpoint)

t.test('tensors are shared out to files in their order, none of them too long unless one tensor is', async (t) => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 1, max: 50 })), fc.integer({ min: 4, max: 300 }), (sizes, most) => {
      const entries = sizes.map((size, i) => inline(`t${i}`, 4 * size))
      const planned = planShards(entries, most)
      t.same(
        planned.flatMap(({ entries }) => entries),
        entries,
      )
      for (const [i, { name, entries, header }] of planned.entries()) {
        t.equal(name, `state-0000${i + 1}-of-0000${planned.length}.safetensors`.replace(/0000(\d\d)/g, '000$1'))
        const bytes = entries.reduce((sum, entry) => sum + entryBytes(entry), 0)
        t.ok(bytes <= most || entries.length === 1)
        const { tensors } = parseSafetensors(Buffer.concat([header, new Uint8Array(bytes)]))
        t.same(
          [...tensors.keys()],
          entries.map(({ name }) => name),
        )
      }
      const index = JSON.parse(indexText(planned))
      t.same(Object.keys(index.weight_map).sort(), entries.map(({ name }) => name).sort())
      t.equal(index.metadata.total_size, 4 * sizes.reduce((sum, size) => sum + size, 0))
    }),
    { numRuns: 100, seed: 2 },
  )
})

t.test('tensors larger than what is read at a time come back, each where it belongs', async (t) => {
  const folder = await start(t)
  const sizes = [9 << 20, 4 << 20, 12, 5 << 20]
  const sources = sizes.map((bytes) => ({ unit: 0, pointer: runtime.allocate(bytes), bytes }))
  for (const [i, { pointer, bytes }] of sources.entries()) {
    viewMemory(pointer, bytes).forEach((_, at, view) => {
      view[at] = (at * 7 + at / 4096 + i) & 255
    })
  }
  const entries = sources.map(
    (placed, i): StateEntry => ({ name: `t${i}`, dtype: 'F32', shape: [placed.bytes / 4], placed }),
  )
  const written: number[] = []
  const entry = await folder.write(
    snapshot(1, { entries: [inline('step', 4), ...entries], file_bytes: 14 << 20 }),
    (count) => written.push(count),
  )
  t.same([...new Set(written)], [1, 2, 3, 4, 5], 'each large one is given back before the next is read')
  const targets = sources.map(({ bytes }) => ({ unit: 0, pointer: runtime.allocate(bytes), bytes }))
  const wanted = targets.map((target, i) => [`t${i}`, { ...target, dtype: 'F32', shape: [target.bytes / 4] }] as const)
  const of = { targets: new Map(wanted), locations: [{ kind: 'host' } as const] }
  await folder.read(entry, await folder.manifest(entry), of)
  for (const [i, { pointer, bytes }] of targets.entries()) {
    t.equal(Buffer.compare(viewMemory(pointer, bytes), viewMemory(sources[i]!.pointer, bytes)), 0)
  }
  for (const { pointer } of [...sources, ...targets]) runtime.free(pointer)
})

t.test('tensors of every size come back, whichever are wanted', async (t) => {
  const size = fc.oneof(fc.nat(40), fc.integer({ min: (1 << 18) - 9, max: (1 << 18) + 9 }), fc.nat(1_300_000))
  const tensor = fc.record({ elements: size, wanted: fc.boolean() })
  await fc.assert(
    fc.asyncProperty(
      fc.array(tensor, { minLength: 1, maxLength: 6 }),
      fc.integer({ min: 1 }),
      async (tensors, seed) => {
        const folder = await start(t)
        const random = seeded(seed)
        const contents = tensors.map(({ elements }) => Float32Array.from({ length: elements }, random))
        const entries = contents.map((content, i): StateEntry => {
          const bytes = new Uint8Array(content.buffer)
          return { name: `t${i}`, dtype: 'F32', shape: [content.length], inline: bytes }
        })
        const entry = await folder.write(snapshot(1, { entries, file_bytes: 7 << 20 }), nothing)
        const chosen = tensors.flatMap(({ wanted, elements }, i) => (wanted && elements > 0 ? [i] : []))
        const placed = chosen.map((i) => {
          const bytes = contents[i]!.byteLength
          return { unit: 0, pointer: runtime.allocate(bytes), bytes }
        })
        const targets = placed.map((at, k) => {
          return [`t${chosen[k]}`, { ...at, dtype: 'F32', shape: [at.bytes / 4] }] as const
        })
        const of = { targets: new Map(targets), locations: [{ kind: 'host' } as const] }
        await folder.read(entry, await folder.manifest(entry), of)
        for (const [k, { pointer, bytes }] of placed.entries()) {
          const expected = new Uint8Array(contents[chosen[k]!]!.buffer)
          t.equal(Buffer.compare(viewMemory(pointer, bytes), expected), 0)
          runtime.free(pointer)
        }
      },
    ),
    // Small tensors in a row that are longer than a piece.
    { numRuns: 30, seed: 5, examples: [[Array(6).fill({ elements: (1 << 18) - 5, wanted: true }), 1]] },
  )
})

t.test('a model of many parameters leaves the event loop to others, and nothing changes meanwhile', async (t) => {
  const folder = await start(t)
  const count = 5000
  const parameters = Array.from({ length: count }, (_, index) => ({ index, name: `w${index}`, shape: [2], group: 'g' }))
  const places = parameters.map(({ index }) => ({ count: index, applied_step: 0, gradient_square: 0 }))
  const entries = Array.from({ length: 2 * count }, (_, i) => inline(`t${i}`, 4))
  const written: number[] = []
  const options = { entries, record: { ...snapshot(0).record, parameters, places } }
  let turns = 0
  const counting = setInterval(() => turns++, 0)
  const entry = await folder.write(snapshot(0, options), (entries) => written.push(entries))
  clearInterval(counting)
  t.ok(turns > 1)
  t.equal(written.at(-1), entries.length)
  t.same(
    written,
    [...new Set(written)].sort((a, b) => a - b),
  )
  t.ok(written.length < count, 'small ones are written together')
  const manifest = await folder.manifest(entry)
  t.same(manifest.parameters, parameters)
  t.same(manifest.places, places)
  t.same(
    Object.keys(manifest.dtypes),
    entries.map(({ name }) => name),
  )
})

t.test('a long file is handed to the disk piece by piece', async (t) => {
  const folder = await start(t)
  const entry = await folder.write(snapshot(1, { entries: [inline('a', 70 << 20)] }), nothing)
  t.ok(entry.bytes > 70 << 20)
  await folder.read(entry, await folder.manifest(entry), { targets: new Map(), locations: [] })
})

t.test(
  'the thread that hashes leaves the processor to the steps',
  { skip: !existsSync('/proc/self/task') },
  async (t) => {
    const folder = await start(t)
    await folder.write(snapshot(1), nothing)
    const tasks = readdirSync('/proc/self/task').map((task) => readFileSync(`/proc/self/task/${task}/stat`, 'utf8'))
    // The nice value is the 17th field behind the name, which may have any character.
    const nices = tasks.map((stat) => Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[16]))
    const own = Math.min(...nices)
    t.equal(nices.filter((nice) => nice === 10 && nice > own).length, 1)
  },
)

t.test('checkpoints are found by id and tag, and kept by count and tag', async (t) => {
  const folder = await start(t)
  for (const step of [1, 2, 3, 4, 5]) await folder.write(snapshot(step, { tags: step === 2 ? ['best'] : [] }), nothing)
  t.match(folder.find('best'), { step: 2 })
  t.match(folder.find('step-000000000003'), { step: 3 })
  t.equal(folder.find('worst'), undefined)
  await folder.retain(2)
  t.same(
    ids(folder),
    [2, 4, 5].map((step) => `step-${String(step).padStart(12, '0')}`),
  )
  await folder.tag(folder.find('step-000000000004')!, 'best')
  await folder.retain(1)
  t.same(ids(folder), ['step-000000000004', 'step-000000000005'], 'the tag leads to another one')
  t.same((await open(folder)).checkpoints, folder.checkpoints)
})

t.test('a checkpoint of the same step is another one', async (t) => {
  const folder = await start(t)
  for (let i = 0; i < 12; i++) await folder.write(snapshot(3), nothing)
  await folder.remove(folder.find('step-000000000003.1')!)
  await folder.write(snapshot(3), nothing)
  t.equal(folder.newest?.checkpoint, 'step-000000000003.12')
  const again = await open(folder)
  t.same(ids(again), ids(folder))
  t.equal(again.newest?.checkpoint, 'step-000000000003.12')
})

t.test('a crash at any moment of going back leaves the run where it was or there, and nothing else', async (t) => {
  const folder = await start(t)
  for (const step of [1, 2, 3, 4]) await folder.write(snapshot(step, { tags: step === 3 ? ['three'] : [] }), nothing)
  const segment = join(folder.path, 'journal', '000000000005.journal')
  writeFileSync(segment, 'steps')
  const [first] = folder.checkpoints
  const seen = async () => {
    const again = await open(folder)
    await again.sweep()
    const { identity, newest, checkpoints, path } = again
    const { branch } = identity
    return {
      branch,
      newest: newest?.step,
      steps: checkpoints.map(({ step }) => step),
      journal: readdirSync(new RunFolder(path, files).journalOf(branch)),
    }
  }
  const before = { branch: 0, newest: 4, steps: [1, 2, 3, 4], journal: ['000000000005.journal'] }
  const after = { branch: 1, newest: 1, steps: [1, 3], journal: [] }
  t.same(await seen(), before)
  mkdirSync(join(folder.path, 'branches', '1', 'checkpoints'), { recursive: true })
  t.same(await seen(), before, 'before the branch is named')
  t.same(readdirSync(join(folder.path, 'branches')), [], 'what was made for it is gone')
  await folder.goBack(first!)
  const copy = `${folder.path}-copy`
  cpSync(folder.path, copy, { recursive: true })
  // Half of what is not needed any more was removed.
  rmSync(join(folder.path, 'checkpoints', 'step-000000000004', 'manifest.json'))
  t.same(await seen(), after)
  t.same(await seen(), after)
  t.notOk(existsSync(segment))
  rmSync(folder.path, { recursive: true })
  renameSync(copy, folder.path)
  t.same(await seen(), after, 'nothing was removed yet')
})

t.test('what is in the way of a checkpoint is told, and the folder goes on', async (t) => {
  const folder = await start(t)
  writeFileSync(join(folder.path, 'checkpoints', 'step-000000000001'), '')
  await t.rejects(folder.write(snapshot(1), nothing), { message: /^EEXIST/ })
  await folder.write(snapshot(2), nothing)
  t.same(ids(folder), ['step-000000000002'])
  const { checkpoint } = folder.newest!
  rmSync(join(folder.path, 'checkpoints', checkpoint, 'manifest.json'))
  await t.rejects(folder.tag(folder.newest!, 'x'), { code: 'ENOENT' })
  await t.rejects(folder.remove(folder.newest!), { code: 'ENOENT' })
  const manifest = join(folder.path, 'checkpoints', checkpoint, 'manifest.json')
  mkdirSync(manifest)
  const unreadable = { name: 'UnreadableError', message: /manifest\.json cannot be read: EISDIR/ }
  await t.rejects(openCheckpoint(join(manifest, '..')), unreadable)
  writeFileSync(join(folder.path, 'branches'), '')
  await t.rejects(open(folder), { code: 'ENOTDIR' })
})

t.test('a folder without a run.json is no run', async (t) => {
  const folder = await start(t)
  t.same(folder.identity, { run: 'r', epoch: 0, branch: 0, branches: [] })
  await folder.identify({ epoch: 3 })
  t.same((await open(folder)).identity, { run: 'r', epoch: 3, branch: 0, branches: [] })
  rmSync(join(folder.path, 'run.json'))
  t.same((await open(folder)).identity.epoch, 0, 'it was never opened')
  await folder.write(snapshot(1), nothing)
  await t.rejects(open(folder), UnreadableError)
  mkdirSync(join(folder.path, '..', 'other'))
  await destroyRun(folder.path)
  t.same(readdirSync(join(folder.path, '..')), ['other'])
})

t.test('param_groups.json has every hyperparameter of every parameter', async (t) => {
  const folder = await start(t)
  const { checkpoint } = await folder.write(snapshot(1), nothing)
  const text = readFileSync(join(folder.path, 'checkpoints', checkpoint, 'param_groups.json'), 'utf8')
  t.same(JSON.parse(text), { 'param_groups.w.algorithm': 'sgd', 'param_groups.w.lr': 0.5 })
})
