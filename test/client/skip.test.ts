import t from 'tap'
import { connect } from '../../src/client/client.js'
import type { ClientFrame, ErrorFrame, ServerFrame, UpdateFrame } from '../../src/wire/frame.js'
import { randomFrom } from './model.js'
import { opened, receipt, type Script, say, startPeer } from './peer.js'
import { QUICK, startProxy } from './service.js'
import { clientOf, fresh, service, type TakeStep, train } from './trainer.js'

const ONES = Float32Array.of(1, 1, 1)
const BAD = Float32Array.of(0, NaN, 0)
const groups = [{ name: 'all', algorithm: 'sgd', lr: 0.5 }]

/** Opens a run of two parameters of three zeros under SGD, whose update is half the gradient. */
async function openPair(t: Tap) {
  const client = await clientOf(t)
  const arrays = [new Float32Array(3), new Float32Array(3)]
  const parameters = arrays.map((data, i) => ({ name: `p${i}`, shape: [3], group: 'all', data }))
  return { run: await client.open({ run: fresh(), groups, parameters }), arrays }
}
type Tap = Parameters<typeof clientOf>[0]

t.test('a step may be ended without what was refused', async (t) => {
  for (const first of [true, false]) {
    const { run, arrays } = await openPair(t)
    const receipt = await run.step(first ? [BAD, ONES] : [ONES, BAD], { skip_refused: true })
    t.match(receipt, { step: 1, applied: 1, skipped: 1 })
    t.match(receipt.refused, [{ code: 'GRADIENT_NOT_FINITE', fields: { parameter: first ? 0 : 1, step: 1 } }])
    t.equal(receipt.refused.length, 1)
    t.match(await run.step([ONES, ONES]), { step: 2, applied: 2, refused: [] })
    const everything = await run.step([BAD, BAD], { skip_refused: true })
    t.match(everything, { applied: 0, skipped: 2 })
    t.equal(everything.refused.length, 2)
    const skipped = await run.step([BAD], { skip_refused: true, skipped: ['p1'] })
    t.match(skipped, { applied: 0, skipped: 2 })
    t.equal(skipped.refused.length, 1)
    t.same(arrays.map(([value]) => value).sort(), [-0.5, -1])
  }
})

t.test('one by one as well: begin says so', async (t) => {
  const { run, arrays } = await openPair(t)
  run.begin({ skip_refused: true })
  run.gradient('p0', BAD)
  run.gradient('p1', ONES)
  t.match(await run.end(), { applied: 1, skipped: 1, refused: [{ fields: { parameter: 0 } }] })
  t.same(
    arrays.map((data) => [...data]),
    [
      [0, 0, 0],
      [-0.5, -0.5, -0.5],
    ],
  )
})

t.test('other bytes for a gradient that was applied are refused: a step cannot be ended without them', async (t) => {
  const { run, arrays } = await openPair(t)
  await t.rejects(run.step([ONES, BAD]), { code: 'GRADIENT_NOT_FINITE' })
  const other = Float32Array.of(2, 2, 2)
  const refused = { code: 'STEP_CONFLICT', fields: { refused: ['p0', 'p1'], parameter: 0 } }
  await t.rejects(run.step([other, BAD], { skip_refused: true }), refused)
  await t.rejects(run.step([other, ONES], { skip_refused: true }), { ...refused, fields: { refused: ['p0'] } })
  t.match(await run.step([ONES, ONES], { skip_refused: true }), { step: 1, applied: 2 })
  t.same(
    arrays.map((data) => [...data]),
    [
      [-0.5, -0.5, -0.5],
      [-0.5, -0.5, -0.5],
    ],
    'nothing is applied twice',
  )
})

/** Every step has two gradients that are refused. */
const stepBroken: TakeStep = (run, gradients) => {
  const broken = gradients.map((gradient, i) => (i === 0 || i === 3 ? Float32Array.from(gradient).fill(NaN) : gradient))
  return run.step(broken, { skip_refused: true })
}

t.test('connections cut after any number of bytes change nothing for a step with refused gradients', async (t) => {
  const expected = await train(await clientOf(t), fresh(), stepBroken)
  let replays = 0
  for (let seed = 0; seed < 8; seed++) {
    const random = randomFrom(seed)
    const budgets = Array.from({ length: 12 }, () => Math.floor(4_500 + 10_000 * (1 + random())))
    const proxy = await startProxy(service.port, [12_000, ...budgets])
    t.teardown(() => proxy.close())
    const client = await clientOf(t, { ...QUICK, retries: 20 }, proxy.url)
    const { weights, digest } = await train(client, fresh(), async (run, gradients) => {
      const receipt = await stepBroken(run, gradients)
      t.match(receipt.refused, [{ fields: { parameter: 0 } }, { fields: { parameter: 3 } }])
      replays += Number(receipt.replayed)
      return receipt
    })
    t.same(weights, expected.weights, `seed ${seed}`)
    t.equal(digest, expected.digest, `seed ${seed}`)
  }
  t.ok(replays > 0, `${replays} receipts were lost and came again`)
})

// What a peer can do at the one moment that matters, and the real service seldom does.

const REFUSED: ErrorFrame = {
  type: 'error',
  code: 'GRADIENT_NOT_FINITE',
  message: 'of the peer',
  status: 422,
  retryable: false,
  parameter: 0,
  step: 1,
}
const INCOMPLETE: ErrorFrame = {
  type: 'error',
  code: 'STEP_INCOMPLETE',
  message: 'lacks w',
  status: 409,
  retryable: false,
}
const UPDATE: UpdateFrame = { type: 'update', parameter: 1, step: 1, offset: 0, scale: 1, decay: 0.5 }

/** `count`: of the frames of this type, over all connections. */
type Answer = (frame: ClientFrame, where: { count: number; connection: number }) => ServerFrame[] | 'cut'

/**
 * Takes a step of `w` and `v` that may leave out what is refused: the frames that the peer got after `open`, and the
 * outcome.
 */
async function stepAt(t: Tap, answer: Answer, step = 0) {
  const frames: ClientFrame[] = []
  const script: Script = (frame, socket, connection) => {
    if (frame.type === 'open') return void say(socket, opened(connection === 0 ? 0 : step))
    frames.push(frame)
    const said = answer(frame, { connection, count: frames.filter(({ type }) => type === frame.type).length })
    if (said === 'cut') socket.terminate()
    else say(socket, ...said)
  }
  const peer = await startPeer(script)
  t.teardown(peer.close)
  const client = await connect(peer.url, QUICK)
  t.teardown(() => client.close())
  const arrays = [Float32Array.of(2, 4), Float32Array.of(2, 4)]
  const parameters = arrays.map((data, i) => ({ name: ['w', 'v'][i]!, shape: [2], group: 'all', data }))
  const run = await client.open({ run: 'r', parameters })
  const gradient = Float32Array.of(1, 1)
  const outcome = await run.step([gradient, gradient], { skip_refused: true }).catch((error) => error)
  const said = frames.map((frame) => (frame.type === 'gradient' ? `gradient ${frame.parameter}` : frame))
  return { outcome, frames: said, weights: arrays.map((data) => [...data]) }
}

t.test('an end that crossed a refusal is sent again without that gradient', async (t) => {
  const { outcome, frames, weights } = await stepAt(t, (frame, { count }) => {
    if (frame.type !== 'end') return []
    return count === 1 ? [UPDATE, REFUSED, INCOMPLETE] : [receipt(1)]
  })
  t.match(outcome, { step: 1, refused: [{ code: 'GRADIENT_NOT_FINITE', message: 'of the peer' }] })
  const ends = [
    { type: 'end', step: 1 },
    { type: 'end', step: 1, skipped: [0] },
  ]
  t.same(frames, ['gradient 0', 'gradient 1', ...ends])
  t.same(weights, [
    [2, 4],
    [1, 2],
  ])
})

t.test('a step that is incomplete for another reason rejects with that', async (t) => {
  const alone = await stepAt(t, (frame) => (frame.type === 'end' ? [UPDATE, INCOMPLETE] : []))
  t.match(alone.outcome, { code: 'STEP_INCOMPLETE', message: 'lacks w' })
  const again = await stepAt(t, (frame, { count }) => {
    if (frame.type !== 'end') return []
    return count === 1 ? [UPDATE, REFUSED, INCOMPLETE] : [INCOMPLETE]
  })
  t.match(again.outcome, { code: 'STEP_INCOMPLETE', message: 'lacks w' })
  t.same(again.frames.length, 4)
})

t.test(
  'a refused gradient is not sent again after the receipt of the step that ended without it was lost',
  async (t) => {
    const answer: Answer = (frame, { connection }) => {
      if (frame.type === 'gradient') return [frame.parameter === 0 ? REFUSED : UPDATE]
      if (frame.type !== 'end' || frame.skipped === undefined) return [INCOMPLETE]
      return connection === 0 ? 'cut' : [{ ...receipt(1), replayed: true }]
    }
    const { outcome, frames, weights } = await stepAt(t, answer, 1)
    t.match(outcome, { step: 1, replayed: true, refused: [{ code: 'GRADIENT_NOT_FINITE' }] })
    t.same(frames.slice(-2), ['gradient 1', { type: 'end', step: 1, skipped: [0] }])
    t.equal(frames.filter((frame) => frame === 'gradient 0').length, 1)
    t.same(
      weights,
      [
        [2, 4],
        [1, 2],
      ],
      'and the update is applied once',
    )
  },
)
