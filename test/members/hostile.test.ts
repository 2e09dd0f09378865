import t from 'tap'
import type { OpenFrame } from '../../src/wire/frame.js'
import type { Range } from '../../src/wire/ranges.js'
import { normal, RawClient, startService, until } from '../service.js'
import { Crew, evenly, gradientsOf, Mate, MODEL, type Split } from './crew.js'

const service = await startService()
t.teardown(() => service.app.close())
const { url } = service

/** A run of one parameter with ten elements. */
const TEN = {
  groups: [{ name: 'g', algorithm: 'sgd', lr: 0.5 }],
  parameters: [{ name: 'w', shape: [10], group: 'g' }],
}
const splitOf = (...ranges: (readonly Range[])[]): Split => [ranges]
const HALVES = splitOf([[0, 5]], [[5, 10]])
const TWO = evenly(MODEL, 2)
const [FIRST, SECOND] = gradientsOf(MODEL, { seed: 7, steps: 2 })
let runs = 0
const name = () => `run-${++runs}`

/** What a connection is told that sends this `open`. */
async function refusalOf(frame: Partial<OpenFrame> & { run: string }) {
  const client = await RawClient.connect(url)
  client.send({ type: 'open', protocol: 1, ...frame })
  const error = await client.expect('error')
  await client.close()
  return error
}

const openOf = (run: string, rank: number, ranges: readonly (readonly number[])[], world_size = 2) => ({
  ...TEN,
  run,
  parameters: [{ ...TEN.parameters[0]!, ranges }],
  member: { rank, world_size },
})

const WRONG: [string, readonly (readonly number[])[], RegExp][] = [
  ['an empty range', [[3, 3]], /ranges\[0\] is \[3,3\], expected a start below its stop/],
  ['a range that runs backwards', [[5, 3]], /expected a start below its stop/],
  [
    'unsorted ranges',
    [
      [5, 7],
      [0, 2],
    ],
    /ranges\[1\] is \[0,2\], expected a start of 7 or more/,
  ],
  [
    'ranges that overlap',
    [
      [0, 4],
      [3, 6],
    ],
    /ranges\[1\] is \[3,6\], expected a start of 4 or more/,
  ],
  ['a range beyond the tensor', [[8, 11]], /expected a stop of at most 10/],
  ['a range of one number', [[8]], /expected \[start, stop\]/],
  ['a range of three numbers', [[1, 2, 3]], /expected \[start, stop\]/],
]
for (const [what, ranges, message] of WRONG) {
  t.test(`${what} is refused with its numbers, and leaves no run behind`, async (t) => {
    const run = name()
    const error = await refusalOf(openOf(run, 1, ranges))
    t.match(error, { code: 'PARAMETER_INVALID', message, parameter: 0 })
    t.match(error.message, /parameter 'w' of rank 1/)
    t.throws(() => service.runs.get(run), { code: 'RUN_NOT_FOUND' })
  })
}

t.test('ranges belong to a member, and ranks to a world', async (t) => {
  const lone = { ...openOf(name(), 0, [[0, 10]]), member: undefined }
  t.match(await refusalOf(lone), { code: 'PARAMETER_INVALID', message: /'w' has ranges, .* give member/ })
  t.match(await refusalOf(openOf(name(), 2, [])), { code: 'PARAMETER_INVALID', message: /rank is 2, .* world_size, 2/ })
  t.match(await refusalOf(openOf(name(), 0, [], 0)), { code: 'PARAMETER_INVALID', message: /world_size is 0/ })
  t.match(await refusalOf(openOf(name(), 0, [], 1025)), { code: 'PARAMETER_INVALID', message: /expected 1 to 1024/ })
})

t.test('more ranges than an open may have are refused with their number', async (t) => {
  const ranges = Array.from({ length: 65_537 }, (_, i) => [2 * i, 2 * i + 1])
  const frame = openOf(name(), 0, ranges)
  const parameters = [{ ...frame.parameters[0]!, shape: [200_000] }]
  t.match(await refusalOf({ ...frame, parameters }), { code: 'OVER_CAPACITY', message: /at most 65536 .* are 65537/ })
})

t.test('two ranks with the same elements: both are named, and the first one goes on', async (t) => {
  const run = name()
  const mate = await new Mate(url, run, { model: TEN, split: HALVES, rank: 0 }).open()
  t.match(await refusalOf(openOf(run, 1, [[4, 10]])), {
    code: 'PARAMETER_INVALID',
    message: /ranks 0 and 1 both have elements \[4,5\) of parameter 'w'/,
  })
  t.match(await refusalOf({ run, member: { rank: 1, world_size: 2 } }), {
    code: 'PARAMETER_INVALID',
    message: /rank 1 has never opened this run/,
  })
  t.match(await refusalOf(openOf(run, 0, [[0, 5]])), { code: 'RUN_BUSY', message: /rank 0 of run/ })
  t.match(await refusalOf(openOf(run, 1, [[5, 10]], 3)), { code: 'RUN_MISMATCH', message: /world_size 3 given/ })
  t.match(await refusalOf({ ...openOf(run, 1, [[5, 10]], 3), takeover: true }), { code: 'RUN_MISMATCH' })
  t.match(await refusalOf({ run, ...TEN }), { code: 'RUN_BUSY', message: /1 connections of 2 members/ })
  const other = await new Mate(url, run, { model: TEN, split: HALVES, rank: 1 }).open()
  t.match(await mate.client.expect('members'), { members: [{ rank: 1, connected: true }] })
  t.same(other.opened.members, [
    { rank: 0, connected: true },
    { rank: 1, connected: true },
  ])
  t.match(await refusalOf({ ...openOf(run, 1, [[6, 10]]), takeover: true }), {
    code: 'RUN_MISMATCH',
    message: /rank 1 has other ranges of parameter 'w'/,
  })
  await other.client.close()
  await mate.client.close()
})

t.test('what a later member gives must be what the first one gave', async (t) => {
  const run = name()
  const mate = await new Mate(url, run, { model: TEN, split: HALVES, rank: 0 }).open()
  const frame = openOf(run, 1, [[5, 10]])
  const other = (keys: object) => refusalOf({ ...frame, ...keys })
  t.match(await other({ groups: [{ ...TEN.groups[0], lr: 0.25 }] }), {
    code: 'RUN_MISMATCH',
    message: /group 'g': lr is 0.5 in the run, 0.25 given/,
  })
  t.match(await other({ parameters: [{ ...frame.parameters[0]!, shape: [5, 2] }] }), { code: 'RUN_MISMATCH' })
  t.match(await other({ mode: 'create', member: { rank: 1, world_size: 3 } }), { code: 'RUN_EXISTS' })
  const created = await new Mate(url, run, { model: TEN, split: HALVES, rank: 1 }).open({ mode: 'create' })
  t.match(created.opened, { resumed: false, epoch: 2, member: { rank: 1, world_size: 2 } })
  await new Crew2(mate, created).step(1)
  await created.client.close()
  t.match(await other({ mode: 'create' }), { code: 'RUN_EXISTS' })
  // Once the run has begun hyperparameters are rank 0's, whatever another rank says.
  await created.open({ groups: [{ ...TEN.groups[0]!, lr: 0.25 }] })
  t.match(created.opened, { resumed: true, groups: { g: { lr: 0.5 } } })
  await created.client.close()
  await mate.client.close()
})

/** Two members of the run of ten elements. */
class Crew2 {
  readonly mates: readonly Mate[]
  constructor(...mates: Mate[]) {
    this.mates = mates
  }
  async step(step: number) {
    for (const mate of this.mates) {
      mate.send(0, step, normal(step, 10))
      mate.end(step)
    }
    return Promise.all(this.mates.map((mate) => mate.receipt()))
  }
}

t.test('elements that nobody has are told with the first end, which may be sent again', async (t) => {
  const run = name()
  const split = splitOf(
    [
      [0, 3],
      [4, 5],
    ],
    [[5, 10]],
    [[3, 4]],
  )
  const mates = [0, 1, 2].map((rank) => new Mate(url, run, { model: TEN, split, rank }))
  const [zero, one, two] = mates as [Mate, Mate, Mate]
  await zero.open()
  zero.send(0, 1, normal(1, 10))
  zero.end(1)
  const missing = { code: 'RANGE_MISSING', status: 409, retryable: true, parameter: 0, step: 1 }
  t.match(await zero.error(), { ...missing, message: /elements \[3,4\) of parameter 'w' .* not opened: 1, 2/ })
  await one.open()
  await two.open()
  zero.end(1)
  for (const mate of [one, two]) {
    mate.send(0, 1, normal(1, 10))
    mate.end(1)
  }
  for (const mate of mates) t.equal((await mate.receipt()).step, 1)
  for (const { client } of mates) await client.close()
})

t.test('a gap that all ranks leave stays one', async (t) => {
  const run = name()
  const split = splitOf([[0, 3]], [[4, 10]])
  const crew = await Crew.open(url, run, { model: TEN, split })
  crew.mates[1]!.end(1, [0])
  t.match(await crew.mates[1]!.error(), { code: 'RANGE_MISSING', message: /\[3,4\) .* all ranks have opened/ })
  await crew.close()
})

t.test('a gap may be at the end of a tensor', async (t) => {
  const crew = await Crew.open(url, name(), { model: TEN, split: splitOf([[3, 9]], [[0, 3]]) })
  crew.mates[0]!.end(1, [0])
  t.match(await crew.mates[0]!.error(), { code: 'RANGE_MISSING', message: /\[9,10\) of parameter 'w'/ })
  await crew.close()
})

t.test('a part is as long as its ranges', async (t) => {
  const run = name()
  const mate = await new Mate(url, run, {
    model: TEN,
    split: splitOf(
      [[2, 4]],
      [
        [0, 2],
        [4, 10],
      ],
    ),
    rank: 0,
  }).open()
  const wrong = new Mate(url, run, { model: TEN, split: splitOf([[2, 5]], []), rank: 0 })
  mate.client.gradient(0, 1, { values: normal(1, 10), extent: wrong.extent(0) })
  t.match(await mate.error(), { code: 'SHAPE_MISMATCH', message: /has 12 bytes or more, expected 8/ })
  const early = new Mate(url, run, { model: TEN, split: splitOf([[0, 2]], []), rank: 0 })
  mate.client.gradient(0, 1, { values: normal(1, 10), extent: early.extent(0) })
  t.match(await mate.error(), { code: 'FRAME_UNEXPECTED', message: /chunk at offset 0, expected 8/ })
})

t.test('a parameter of which a member has nothing is not its to send', async (t) => {
  const run = name()
  const mate = await new Mate(url, run, { model: TEN, split: splitOf([[0, 10]], []), rank: 1 }).open()
  mate.client.gradient(0, 1, { values: normal(1, 10) })
  t.match(await mate.error(), { code: 'SHAPE_MISMATCH', message: /has 40 bytes or more, expected 0/ })
  await mate.client.close()
})

t.test('a mixture of sent and skipped is refused to whoever completes it, and names the ranks', async (t) => {
  const model = { ...TEN, parameters: [...TEN.parameters, { name: 'v', shape: [4], group: 'g' }] }
  const split: Split = [
    [[[0, 5]], [[5, 10]]],
    [[[0, 2]], [[2, 4]]],
  ]
  const run = name()
  const crew = await Crew.open(url, run, { model, split })
  const [zero, one] = crew.mates as [Mate, Mate]
  const [w, v] = [normal(1, 10), normal(2, 4)]
  zero.send(1, 1, v)
  zero.send(0, 1, w)
  one.send(0, 1, w)
  await until(() => zero.client.updates.has(0))
  one.end(1, [1])
  t.match(await one.error(), {
    code: 'STEP_CONFLICT',
    message: /'v' is sent by rank 0 and skipped by rank 1 in step 1/,
    parameter: 1,
    expected_step: 1,
  })
  // It takes its own part back, and with the other's all have skipped.
  zero.end(1, [1])
  one.end(1, [1])
  const receipts = await Promise.all([zero.receipt(), one.receipt()])
  for (const receipt of receipts) t.match(receipt, { applied: 1, skipped: 1 })

  zero.send(0, 2, w)
  one.send(0, 2, w)
  zero.end(2, [1])
  await until(() => service.runs.get(run).intake.ended.includes(0))
  one.send(1, 2, v)
  t.match(await one.error(), { code: 'STEP_CONFLICT', message: /sent by rank 1 and skipped by rank 0/, parameter: 1 })
  one.end(2, [1])
  t.match(await Promise.all([zero.receipt(), one.receipt()]), [{ step: 2 }, { step: 2 }])
  await crew.close()
})

t.test('an applied parameter cannot be skipped any more, and one that is neither is told to its member', async (t) => {
  const crew = await Crew.open(url, name(), { model: MODEL, split: TWO })
  const [zero, one] = crew.mates as [Mate, Mate]
  for (const mate of crew.mates) mate.send(0, 1, FIRST![0]!)
  await until(() => zero.client.updates.has(0))
  one.end(1, [0, 1, 2, 3, 4])
  t.match(await one.error(), { code: 'STEP_CONFLICT', message: /'square' was applied in step 1/, parameter: 0 })
  zero.end(1, [1, 2, 3])
  t.match(await zero.error(), { code: 'STEP_INCOMPLETE', message: /'scalar'/ })
  zero.end(1, [1, 2, 3, 4])
  one.end(1, [1, 2, 3])
  t.match(await Promise.all([zero.receipt(), one.receipt()]), [{ applied: 1 }, { applied: 1 }])
  await crew.close()
})

t.test('NaN in one part refuses the gradient for all, and names who sent it', async (t) => {
  const crew = await Crew.open(url, name(), {
    model: TEN,
    split: splitOf(
      [
        [0, 3],
        [6, 7],
      ],
      [[3, 6]],
      [[7, 10]],
    ),
  })
  const bad = normal(1, 10)
  bad[6] = Number.NaN
  for (const mate of crew.mates) {
    mate.send(0, 1, bad)
    mate.end(1)
  }
  for (const mate of crew.mates) {
    t.match(await mate.error(), {
      code: 'GRADIENT_NOT_FINITE',
      message: /NaN or Inf was sent by rank 0$/,
      parameter: 0,
    })
    t.match(await mate.error(), { code: 'STEP_INCOMPLETE' })
  }
  for (const mate of crew.mates) {
    mate.send(0, 1, normal(1, 10))
    mate.end(1)
  }
  const receipts = await Promise.all(crew.mates.map((mate) => mate.receipt()))
  t.equal(new Set(receipts.map(({ digest }) => digest)).size, 1)
  await crew.close()
})

t.test('hyperparameters are rank 0’s', async (t) => {
  const run = name()
  const crew = await Crew.open(url, run, { model: TEN, split: HALVES })
  const [zero, one] = crew.mates as [Mate, Mate]
  one.client.send({ type: 'step', step: 1, groups: { g: { lr: 1 } } })
  t.match(await one.error(), { code: 'STEP_CONFLICT', message: /rank 1 gives values of step 1 before rank 0/ })
  zero.client.send({ type: 'step', step: 1, groups: { g: { lr: 1 } }, gradient_scale: 0.5 })
  await until(() => service.runs.get(run).groups.get('g')!.hyperparameters.lr === 1)
  one.client.send({ type: 'step', step: 1, groups: { g: { lr: 2 } } })
  t.match(await one.error(), { code: 'STEP_CONFLICT', message: /of rank 1, which are rank 0's to give/ })
  one.client.send({ type: 'step', step: 1, gradient_scale: 1 })
  t.match(await one.error(), { code: 'STEP_CONFLICT' })
  one.client.send({ type: 'step', step: 1, groups: { g: { lr: 1 } }, gradient_scale: 0.5 })
  for (const mate of crew.mates) {
    mate.send(0, 1, normal(1, 10))
    mate.end(1)
  }
  t.match(await Promise.all([zero.receipt(), one.receipt()]), [{ groups: { g: { lr: 1 } } }, { step: 1 }])
  await crew.close()
})

t.test('an end is answered for its own connection only, and again as often as it is sent', async (t) => {
  const crew = await Crew.open(url, name(), { model: MODEL, split: TWO })
  const { receipts } = await crew.step(1, FIRST!)
  for (const mate of crew.mates) mate.end(1)
  for (const mate of crew.mates) t.match(await mate.receipt(), { replayed: true, digest: receipts[0]!.digest })
  await crew.mates[1]!.client.close()
  await crew.mates[1]!.open()
  t.match(crew.mates[1]!.opened, { step: 1, resumed: true, ahead: [] })
  const { receipts: next } = await crew.step(2, SECOND!)
  t.match(next, [{ step: 2 }, { step: 2, digest: next[0]!.digest }])
  await crew.close()
})
