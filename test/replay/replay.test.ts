import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { blocksOf } from '../../kernels/blocks.js'
import { numberToBfloat16 } from '../../kernels/narrow.js'
import { createScanner } from '../../src/device/cpu/scan.js'
import { withRecording } from '../../src/replay/recording.js'
import { fingerprintText } from '../../src/run/record.js'
import { CheckpointFiles } from '../../src/store/checkpoint/checkpoint-files.js'
import type { Head } from '../../src/store/journal/journal-format.js'
import { checkpoints, copyFolder, flip, id, manifestOf, reseal, runFolder, stateFile } from '../keep/data-folder.js'
import { MODEL as CREW, evenly, gradientsOf as gradientsOfCrew } from '../members/crew.js'
import { seeded } from '../reference.js'
import { closeTroop, openTroop, receipts, send } from '../replicas/troop.js'
import { MODEL, type Trace, train, trainStep } from '../run/trainer.js'
import { normal, RawClient, type Service } from '../service.js'
import { filesIn, forge, groupsFile, printed, recorder, replaying } from './recorded.js'

const LAST = 12
const journal = (data: string, first: number) =>
  join(runFolder(data), 'journal', `${String(first).padStart(12, '0')}.journal`)

async function recording(t: Test, settings: Parameters<typeof recorder>[1], last: number) {
  const data = t.testdir({})
  const service = await recorder(data, settings)
  t.teardown(() => service.app.close())
  return { data, service, ...(await train(service, { last })) }
}

/** A run `r` of LAST steps that a service has recorded, which the tests take copies of. */
let shared: { data: string; service: Service; traces: Trace[] }
t.before(async () => {
  const data = t.testdir({})
  const service = await recorder(data)
  const { client, traces } = await train(service, { last: LAST })
  await client.close()
  shared = { data, service, traces }
})
t.teardown(() => shared.service.app.close())

/** A copy of the recorded run that a test may damage. */
function copied(t: Test): string {
  const data = t.testdir({})
  copyFolder(runFolder(shared.data), runFolder(data))
  return data
}

t.test(
  'a run is computed again, over its checkpoints, beside its service, and its folder stays as it is',
  async (t) => {
    const { data, traces } = shared
    const digests = traces.map(({ step, digest }) => ({ step, digest }))
    const before = filesIn(data)
    const whole = await replaying(data, 'r')
    t.match(whole, { equal: true, steps_equal: LAST, checkpoint: id(0), from_step: 0, to_step: LAST })
    t.match(whole.steps, digests)
    t.same(Object.keys(whole.steps[2]!.rows).length, MODEL.groups.length - 1, 'a group that is skipped has no row')
    const part = await replaying(data, 'r', { from: id(5), to: 9 })
    t.match(part, { equal: true, steps_equal: 4, checkpoint: id(5), from_step: 5, to_step: 9 })
    t.match(part.steps, digests.slice(5, 9))
    t.same(part.steps[0]!.rows, whole.steps[5]!.rows)
    t.match(
      await printed(data, 'r'),
      `12 steps computed again: every digest is the journal's, the last one is ${digests.at(-1)!.digest}`,
    )
    t.same(filesIn(data), before)
  },
)

t.test('the journal goes back as far as the checkpoints that are kept', async (t) => {
  const { data, service, client } = await recording(t, { checkpoints_kept: 2 }, 16)
  t.same(checkpoints(data), [id(10), id(15)])
  t.same(readdirSync(join(runFolder(data), 'journal')).length, 2)
  t.match(await replaying(data, 'r'), { equal: true, checkpoint: id(10), steps_equal: 6 })
  // A restart reads the steps behind the newest checkpoint alone, and writes on behind them.
  await client.close()
  await service.app.close()
  const again = await recorder(data, { checkpoints_kept: 2 })
  const { client: second } = await train(again, { last: 17, open: { mode: 'resume' } })
  t.match(await replaying(data, 'r'), { equal: true, checkpoint: id(10), steps_equal: 7 })
  t.ok(again.runs.get('r').journal!.bytes < 20_000, 'what a checkpoint has is not counted')
  await second.close()
  await again.app.close()
})

t.test('a service may end the journal with a checkpoint while it is read', async (t) => {
  const { data, service, client } = await recording(
    t,
    { keep_journal: false, checkpoints_kept: 1, checkpoint_steps: 0 },
    6,
  )
  const files = new CheckpointFiles()
  await withRecording({ data, run: 'r' }, files, async (recording) => {
    await service.runs.keeper('r').take()
    await trainStep(client, 7)
    t.same(checkpoints(data), [id(6)])
    const steps: number[] = []
    for await (const { step } of recording.steps()) steps.push(step)
    t.same(steps, [1, 2, 3, 4, 5, 6], 'not the step that has come since')
  })
  await files.close()
  t.match(await replaying(data, 'r'), { checkpoint: id(6), steps_equal: 1 })
  await client.close()
  await service.app.close()
})

/** Values of a gradient as a client sends them. */
function encoded(values: Float32Array, dtype: string): Float32Array | Uint16Array | Uint8Array {
  if (dtype === 'float32') return values
  if (dtype === 'bfloat16') return Uint16Array.from(values, numberToBfloat16)
  // A binary16 with an exponent of 1 to 15 is below 2.
  if (dtype === 'float16')
    return Uint16Array.from(values, (value) => (0x3c00 | (Math.abs(value) * 64)) ^ (value < 0 ? 0x8000 : 0))
  return blocksOf(values, dtype as 'int8_block256')
}

const ALGORITHMS = [
  { algorithm: 'muon', momentum_form: 'heavy_ball' },
  { algorithm: 'muon', second_momentum: 'normuon', momentum_dtype: 'bfloat16' },
  { algorithm: 'muon', preset: 'moonlight' },
  { algorithm: 'adamw', lr: 0.01 },
  { algorithm: 'adam', amsgrad: true },
  { algorithm: 'rmsprop', momentum: 0.5 },
  { algorithm: 'sgd', momentum: 0.9, dampening: 0.5 },
  { algorithm: 'sgd' },
]
const DTYPES = ['float32', 'bfloat16', 'float16', 'int8_block256', 'int4_block64']

/** A run that a seed says everything of: its groups, types, schedule and which parameters it skips. */
async function randomRun(service: Service, run: string, seed: number): Promise<string[]> {
  const random = seeded(seed)
  const one = <T>(list: readonly T[]) => list[Math.floor(random() * list.length)]!
  const groups = Array.from({ length: 3 }, (_, i) => ({ name: `g${i}`, ...one(ALGORITHMS) }))
  const parameters = Array.from({ length: 5 }, (_, i) => ({
    ...{ name: `p${i}`, shape: [1 + Math.floor(random() * 9), 1 + Math.floor(random() * 40)], group: one(groups).name },
    ...{ gradient_dtype: one(DTYPES), update_dtype: one(DTYPES) },
  }))
  const client = await RawClient.connect(service.url)
  await client.open({ run, groups, parameters })
  const digests: string[] = []
  for (let step = 1; step <= 7; step++) {
    const changed = { [one(groups).name]: { lr: random() } }
    client.send({ type: 'step', step, ...(random() < 0.5 && { groups: changed }), gradient_scale: one([1, -1, 0.25]) })
    const skipped = parameters.flatMap((_, i) => (random() < 0.2 || step === 4 ? [i] : []))
    for (const [i, { shape, gradient_dtype }] of parameters.entries()) {
      if (skipped.includes(i)) continue
      client.gradient(i, step, {
        values: encoded(normal(seed * 1000 + step * 10 + i, shape[0]! * shape[1]!), gradient_dtype),
      })
    }
    client.send({ type: 'end', step, skipped })
    digests.push((await client.expect('receipt')).digest)
    await service.runs.keeper(run).settled()
  }
  await client.close()
  return digests
}

t.test('whatever algorithms, types, schedules and skips a run has, every digest is the same again', async (t) => {
  const { data, service } = shared
  for (const seed of [1, 2, 3, 4, 5]) {
    const digests = await randomRun(service, `run-${seed}`, seed)
    const { steps, equal } = await replaying(data, `run-${seed}`)
    t.equal(equal, true)
    t.same(
      steps.map(({ digest }) => digest),
      digests,
      `seed ${seed}`,
    )
  }
})

t.test('means of replicas are computed again from the means that the journal has', async (t) => {
  const { data, service } = shared
  const model = {
    ...CREW,
    parameters: CREW.parameters.map((one, i) => (i === 0 ? { ...one, gradient_dtype: 'int8_block256' } : one)),
  }
  const sent = [0, 1].map((replica) =>
    gradientsOfCrew(CREW, { seed: 500 + 100 * replica, steps: 3 }).map((step) =>
      step.map((values, i) => (i === 0 ? blocksOf(values, 'int8_block256') : values)),
    ),
  )
  const troop = await openTroop(service.url, 'troop', { model, split: evenly(model, 1), replicas: 2 })
  const digests: string[] = []
  for (const step of [1, 2, 3]) {
    for (const [i, replica] of troop.entries()) send(replica, step, { gradients: sent[i]![step - 1]!, weight: 1 + i })
    const all = await Promise.all(troop.map(receipts))
    digests.push(all[0]![0]!.digest)
  }
  await closeTroop(troop)
  const groups = groupsFile(t.testdir({}), [{ name: 'm', algorithm: 'sgd', lr: 1 }])
  const again = await replaying(data, 'troop', { groups })
  t.match(again, { equal: true, steps: digests.map((digest) => ({ digest })) })
  t.match(again.notes.at(-1), /^gradients are means of replicas/)
  for (const { rows } of again.steps)
    t.ok(Math.abs(rows.m!.alternative!.update_norm / rows.m!.gradient_norm - 1) < 1e-6, 'sgd sends the mean itself')
})

t.test('a run that begins at a checkpoint of another one is replayed from there', async (t) => {
  const { data, service } = shared
  const second = await train(service, {
    run: 'second',
    last: 8,
    open: { mode: 'create', from: { run: 'r', checkpoint: id(5) }, ...MODEL },
  })
  t.match(await replaying(data, 'second'), {
    equal: true,
    from_step: 5,
    steps_equal: 3,
    steps: second.traces.map(({ digest }) => ({ digest })),
  })
  await second.client.close()
})

const scanner = createScanner()

/** Flips a bit of the gradient of `parameter` for step 8; `deep` says what of the records is made to fit. */
function flipped(deep: 'nothing' | 'gradient' | 'update', parameter = 3) {
  return (head: Head, payload: Buffer): Head => {
    if (head.type !== 'gradient' || head.step !== 8 || head.parameter !== parameter) return head
    payload[2]! ^= 1
    const gradient_fingerprint = fingerprintText(scanner.fingerprint(payload))
    if (deep === 'nothing') return head
    return { ...head, applied: { ...head.applied, gradient_fingerprint } }
  }
}

t.test('the first step that is another one is named, with the parameter and both digests', async (t) => {
  const data = copied(t)
  const path = journal(data, 6)
  const expected = shared.traces[7]!.digest
  const twice = async (change: (head: Head, payload: Buffer) => Head | undefined, undo = change) => {
    forge(path, change)
    const result = await replaying(data, 'r', { from: id(5) })
    t.match(result, {
      equal: false,
      steps_equal: 2,
      difference: { step: 8, digest: { journal: expected } },
    })
    forge(path, undo)
    return result.difference
  }
  t.match((await twice(flipped('nothing')))!.parameter, { name: 'embedding', what: 'the fingerprint of its gradient' })
  const forged = await twice(flipped('gradient'))
  t.match(forged!.parameter, { name: 'embedding', what: 'the fingerprint of its update' })
  t.not(forged!.digest.computed, expected)
  const { computed, journal: first } = forged!.parameter!
  // The record of the update is made to fit as well: only the digest knows.
  const rewritten = (from: string, to: string, deep: 'gradient') => (head: Head, payload: Buffer) => {
    const changed = flipped(deep)(head, payload)
    const fits = changed.type === 'gradient' && changed.applied.update_fingerprint === from
    return fits ? { ...changed, applied: { ...changed.applied, update_fingerprint: to } } : changed
  }
  const all = await twice(rewritten(first, computed, 'gradient'), rewritten(computed, first, 'gradient'))
  forge(path, rewritten(first, computed, 'gradient'))
  t.match(
    await printed(data, 'r', { from: id(5) }),
    '\nevery update is the one that the journal has: its digest, or one before it, is another\ndigest ',
  )
  forge(path, rewritten(computed, first, 'gradient'))
  t.equal(all!.parameter, undefined)
  t.equal(all!.digest.computed, forged!.digest.computed)
  const scaled = (factor: number) => (head: Head) =>
    head.type === 'gradient' && head.step === 8 && head.parameter === 0
      ? { ...head, applied: { ...head.applied, scale: head.applied.scale * factor } }
      : head
  t.match((await twice(scaled(2), scaled(0.5)))!.parameter, { name: 'm', what: 'scale' })
  t.match(await replaying(data, 'r'), { equal: true })
})

t.test('records that are none of their step are refused by name', async (t) => {
  const data = copied(t)
  const path = journal(data, 6)
  const cases: [RegExp, (head: Head, payload: Buffer) => Head | undefined][] = [
    [
      /neither has nor skips parameter 'm'$/,
      (head) => (head.type === 'gradient' && head.parameter === 0 ? undefined : head),
    ],
    [
      /a gradient of parameter 99 for step 6 is none of step 6$/,
      (head) => (head.type === 'gradient' && head.parameter === 0 ? { ...head, parameter: 99 } : head),
    ],
    [
      /a gradient of parameter 0 for step 3 is none of step 6$/,
      (head) => (head.type === 'gradient' && head.parameter === 0 ? { ...head, step: 3 } : head),
    ],
    [
      /the gradient of parameter 'qk' has 1536 bytes, expected 768$/,
      (head) => (head.type === 'gradient' && head.parameter < 2 ? { ...head, parameter: 1 - head.parameter } : head),
    ],
    [
      /holds NaN or Inf/,
      (head, payload) => {
        payload.fill(0xff)
        return head
      },
    ],
  ]
  const whole = readFileSync(path)
  for (const [message, change] of cases) {
    forge(path, change)
    await t.rejects(replaying(data, 'r', { from: id(5) }), { name: 'UnreadableError', message })
    writeFileSync(path, whole)
  }
})

t.test('what cannot be computed again is refused with the reason and what is there', async (t) => {
  const data = copied(t)
  const refused = (message: string | RegExp, options: Parameters<typeof replaying>[2] = {}) =>
    t.rejects(replaying(data, 'r', options), { name: 'UnreadableError', message })
  await refused(`run 'r' has no checkpoint 'best', there are ${id(0)}, ${id(5)}, ${id(10)}`, { from: 'best' })
  await refused(`--to is 13, the last step in the journal of run 'r' is 12`, { to: 13 })
  await refused(`step 5 is to be the last one, checkpoint '${id(10)}' is behind it`, { from: id(10), to: 5 })
  await t.rejects(replaying(data, 'other'), { message: /^data folder '.*' has no run 'other': ENOENT/ })
  await t.rejects(replaying(data, '../r'), { message: `'../r' is no name of a run` })
  flip(stateFile(data), -1)
  await refused(/state-00001-of.* has SHA-256 .*, expected /, { from: id(5) })
  flip(stateFile(data), -1)
  flip(manifestOf(data, 5), 100)
  await refused(/manifest\.json has SHA-256/, { from: id(5) })
  t.match(await replaying(data, 'r'), { checkpoint: id(0), equal: true })
  flip(manifestOf(data, 0), 100)
  t.match(await replaying(data, 'r'), { checkpoint: id(10), equal: true })
  await refused(new RegExp(`SHA-256.*; checkpoint '${id(10)}' is behind step 6$`), { to: 7 })
  flip(manifestOf(data, 10), 100)
  await refused(/has steps 1 to 12 in its journal and no checkpoint that they can be computed from: .*SHA-256/)
  for (const step of [0, 5, 10]) flip(manifestOf(data, step), 100)
  // A journal without its first segment: what is before the second one is not there.
  rmSync(journal(data, 1))
  const problem = `checkpoint '${id(0)}' is of step 0, and the journal begins with step 6: what is between is not kept`
  await refused(problem, { from: id(0) })
  t.match(await replaying(data, 'r'), { checkpoint: id(5), steps_equal: 7 })
})

t.test('a journal with a gap is one that begins behind it', async (t) => {
  const data = copied(t)
  rmSync(journal(data, 6))
  t.match(await replaying(data, 'r'), { checkpoint: id(10), steps_equal: 2 })
  flip(join(runFolder(data), 'run.json'), 5)
  await t.rejects(replaying(data, 'r'), { message: /run\.json has SHA-256/ })
  flip(join(runFolder(data), 'run.json'), 5)
  rmSync(join(runFolder(data), 'checkpoints'), { recursive: true })
  await t.rejects(replaying(data, 'r'), { message: /that they can be computed from: there is none$/ })
  for (const first of [1, 11]) rmSync(journal(data, first))
  await t.rejects(replaying(data, 'r'), { message: /^run 'r' has no steps in its journal: .*--keep-journal$/ })
})

t.test('steps before an import, and those of a branch that was left, are refused', async (t) => {
  const { data, service, client } = await recording(t, { checkpoint_steps: 2 }, 6)
  const state = Buffer.from(await (await fetch(`${service.http}/v1/runs/r/state`)).arrayBuffer())
  const headers = { 'content-type': 'application/octet-stream' }
  t.equal((await fetch(`${service.http}/v1/runs/r/state`, { method: 'PUT', body: state, headers })).status, 200)
  for (const step of [7, 8, 9]) await trainStep(client, step)
  await service.runs.keeper('r').settled()
  t.match(await replaying(data, 'r'), { checkpoint: `${id(6)}.1`, steps_equal: 3, equal: true })
  await t.rejects(replaying(data, 'r', { from: id(4) }), { message: /the journal begins with step 7/ })
  await client.close()
  const back = await RawClient.connect(service.url)
  const tagged = await fetch(`${service.http}/v1/runs/r/checkpoints`, {
    method: 'POST',
    body: '{"tag":"end"}',
    headers: { 'content-type': 'application/json' },
  })
  t.equal(tagged.status, 201)
  await back.open({ run: 'r', mode: 'resume', checkpoint: id(8) })
  await trainStep(back, 9, 11)
  await service.runs.keeper('r').settled()
  t.match(await replaying(data, 'r'), { checkpoint: id(8), steps_equal: 1, equal: true })
  await t.rejects(replaying(data, 'r', { from: 'end' }), {
    message: /is of branch 0 of the history, which the run has left with its journal$/,
  })
  await back.close()
  await service.app.close()
})

t.test('a journal that crosses an import is not replayed past it', async (t) => {
  // As a crash leaves it between the checkpoint of the import and the end of the journal before it.
  const { data, service, client } = await recording(t, { checkpoint_steps: 0 }, 3)
  const before = readFileSync(journal(data, 1))
  const state = Buffer.from(await (await fetch(`${service.http}/v1/runs/r/state`)).arrayBuffer())
  const headers = { 'content-type': 'application/octet-stream' }
  await fetch(`${service.http}/v1/runs/r/state`, { method: 'PUT', body: state, headers })
  await trainStep(client, 4)
  await client.close()
  await service.app.close()
  writeFileSync(journal(data, 1), before)
  t.match(await replaying(data, 'r'), { checkpoint: `${id(3)}.1`, steps_equal: 1 })
  const remedy = `checkpoint '${id(0)}' comes before an import of state, ${id(3)}.1: replay from there, or --to 3 at most`
  await t.rejects(replaying(data, 'r', { from: id(0) }), { message: remedy })
  t.match(await replaying(data, 'r', { to: 3 }), { checkpoint: id(0), steps_equal: 3, equal: true })
})

t.test('a checkpoint of another kind of device is replayed, and told', async (t) => {
  const data = copied(t)
  reseal(data, ({ device }) => ({ device: { ...device, processor: 'Abacus' } }))
  const { equal, notes } = await replaying(data, 'r', { from: id(5) })
  t.equal(equal, true)
  t.match(notes.at(-1), new RegExp(`^of ${id(5)}: its last steps were computed on cpu Abacus .*: results may differ`))
})
