import t from 'tap'
import type { ReplayedStep } from '../../src/replay/replay.js'
import type { Row } from '../../src/replay/rows.js'
import { spikesOf } from '../../src/replay/spikes.js'
import { gaussian } from '../reference.js'
import { normal, RawClient } from '../service.js'
import { printed, recorder, replaying } from './recorded.js'

const row = (name: string): Row => ({ name, group: name, algorithm: 'sgd', parameters: [] })

/** Steps with these gradient norms of each row; undefined where a step skips it. */
function stepsOf(...rows: (number | undefined)[][]): ReplayedStep[] {
  return rows[0]!.map((_, i) => ({
    ...{ step: i + 1, digest: '' },
    rows: rows.map((norms, at) => {
      const gradient_norm = norms[i]
      if (gradient_norm === undefined) return undefined
      const largest = { parameter: `p${at}`, gradient_norm }
      return { lr: 1, gradient_norm, update_norm: 1, update_rms: 1, largest }
    }),
  }))
}

/** Norms of training: they fall, and differ by a factor of about e^0.2 from step to step. */
const falling = (seed: number, steps: number) =>
  [...gaussian(seed, steps)].map((noise, i) => 10 / (1 + i / 50) + Math.exp(0.2 * noise))

t.test('norms that fall and jitter as those of training do leave no band', async (t) => {
  for (const seed of [1, 2, 3, 4, 5]) t.same(spikesOf([row('a')], stepsOf(falling(seed, 2000))), [], `seed ${seed}`)
  t.same(spikesOf([row('a')], stepsOf(Array.from({ length: 100 }, () => 1))), [], 'norms that are all the same')
  t.same(
    spikesOf([row('a')], stepsOf(Array.from({ length: 100 }, (_, i) => (i === 70 ? 1.9 : 1)))),
    [],
    'less than twice',
  )
  t.same(
    spikesOf([row('a')], stepsOf(Array.from({ length: 100 }, (_, i) => (i === 15 ? 50 : 1)))),
    [],
    'too few before',
  )
  t.same(spikesOf([row('a')], stepsOf(Array.from({ length: 100 }, (_, i) => (i < 50 ? 0 : 1)))), [], 'zeros')
  t.same(spikesOf([row('a')], stepsOf([])), [])
})

t.test('a spike is named with its first step, its last one and its peak', async (t) => {
  const norms = falling(6, 300)
  for (const [step, norm] of [
    [120, 90],
    [121, 400],
    [122, 70],
    [250, 40],
  ] as const)
    norms[step - 1] = norm
  const other = Array.from({ length: 300 }, (_, i) => (i % 2 === 0 ? undefined : i === 199 ? 2.1 : 1))
  const spikes = spikesOf([row('a'), row('b')], stepsOf(norms, other))
  t.match(spikes, [
    { row: 'a', step: 120, last_step: 122, gradient_norm: 90, peak: 400, parameter: 'p0' },
    { row: 'b', step: 200, last_step: 200, gradient_norm: 2.1, peak: 2.1, median: 1, bound: 2, parameter: 'p1' },
    { row: 'a', step: 250, last_step: 250, gradient_norm: 40, peak: 40 },
  ])
  t.equal(spikes.length, 3)
})

t.test('the step at which the gradients of a run left their band is found, and none in a run without', async (t) => {
  const data = t.testdir({})
  const service = await recorder(data, { checkpoint_steps: 0 })
  for (const run of ['calm', 'spike']) {
    const client = await RawClient.connect(service.url)
    const groups = ['a', 'b'].map((name) => ({ name, algorithm: 'sgd' }))
    const parameters = ['p', 'q', 'r'].map((name) => ({ name, shape: [20], group: name === 'r' ? 'b' : 'a' }))
    await client.open({ run, groups, parameters })
    for (let step = 1; step <= 30; step++) {
      const gradients = [0, 1, 2].map((i) => normal(10 * step + i, 20))
      if (run === 'spike' && [22, 24, 25].includes(step)) gradients[1] = gradients[1]!.map((value) => value * 30)
      await client.step(step, gradients)
    }
    await client.close()
  }
  await service.app.close()
  t.match(await replaying(data, 'spike'), {
    spikes: [
      { step: 22, last_step: 22 },
      { row: 'a', step: 24, last_step: 25, parameter: 'q' },
    ],
  })
  t.same((await replaying(data, 'calm')).spikes, [])
  t.match(await printed(data, 'calm'), '\n\nno gradient norm left its band\n\n')
  const text = await printed(data, 'spike', { every: 10 })
  t.match(text, /^step 22: the gradient norm of a is \d+(\.\d+)?; its median over up to 64 steps before is /m)
  t.match(
    text,
    /^step 24: the gradient norm of a is \d+(\.\d+)? \(to step 25, at most \d+(\.\d+)?\); its median over up to 64 steps before is /m,
  )
  t.same(
    [...text.split('\n\n')[1]!.matchAll(/^ +(\d+) /gm)].map(([, step]) => Number(step)),
    [1, 10, 20, 22, 24, 30],
  )
})
