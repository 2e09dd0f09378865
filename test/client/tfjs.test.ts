import '@tensorflow/tfjs-backend-cpu'
import tf, { type Scalar } from '@tensorflow/tfjs-core'
import layers, { type Sequential } from '@tensorflow/tfjs-layers'
import t from 'tap'
import { connect } from '../../src/client/client.js'
import { openOptimizer, variablesOf } from '../../src/client/tfjs.js'
import { gaussian, relativeDistance } from '../reference.js'
import { startService } from './service.js'

await tf.setBackend('cpu')
const service = await startService()
const client = await connect(service.url)
t.teardown(async () => {
  await client.close()
  await service.app.close()
})

const matrix = (seed: number, rows: number, columns: number) =>
  tf.tensor2d(Float32Array.from(gaussian(seed, rows * columns)), [rows, columns])
const INPUTS = matrix(1, 32, 6)
const TARGETS = matrix(2, 32, 3)
const STEPS = 10

/** A model of two layers; its weights depend on nothing. */
function model(): Sequential {
  const made = layers.sequential()
  made.add(layers.layers.dense({ units: 8, inputShape: [6], activation: 'tanh' }))
  made.add(layers.layers.dense({ units: 3 }))
  made.setWeights([tf.div(matrix(3, 6, 8), 3), tf.zeros([8]), tf.div(matrix(4, 8, 3), 3), tf.zeros([3])])
  return made
}

const lossOf = (made: Sequential) => (): Scalar =>
  tf.losses.meanSquaredError(TARGETS, made.apply(INPUTS, { training: true }) as tf.Tensor) as Scalar
const weightsOf = (made: Sequential) => made.getWeights().map((weight) => weight.dataSync())

const CASES = [
  { name: 'sgd', group: { algorithm: 'sgd', lr: 0.1 }, theirs: () => tf.train.sgd(0.1) },
  { name: 'momentum', group: { algorithm: 'sgd', lr: 0.1, momentum: 0.9 }, theirs: () => tf.train.momentum(0.1, 0.9) },
  { name: 'adam', group: { algorithm: 'adam', lr: 0.02, eps: 1e-7 }, theirs: () => tf.train.adam(0.02) },
] as const

for (const { name, group, theirs } of CASES) {
  t.test(`a model is trained as with tf.train.${name}`, async (t) => {
    const [ours, other] = [model(), model()]
    const optimizer = await openOptimizer(client, {
      run: `tfjs-${name}`,
      groups: [{ name: 'all', ...group }],
      variables: variablesOf(ours),
    })
    const reference = theirs()
    const losses: number[] = []
    for (let step = 1; step <= STEPS; step++) {
      const loss = await optimizer.minimizeAsync(lossOf(ours))
      losses.push(loss.dataSync()[0]!)
      const expected = reference.minimize(lossOf(other), true)
      t.ok(Math.abs(losses.at(-1)! - expected!.dataSync()[0]!) < 1e-5, `the loss of step ${step}`)
      tf.dispose([loss, expected!])
    }
    t.ok(losses.at(-1)! < losses[0]!)
    for (const [i, weights] of weightsOf(ours).entries())
      t.ok(relativeDistance(weights, weightsOf(other)[i]!) < 1e-5, `weight ${i}`)
    t.equal(optimizer.run.step_count, STEPS)
  })
}

t.test('Muon takes matrices as torch has them', async (t) => {
  const values = Float32Array.from(gaussian(5, 12))
  const [wide, tall] = [tf.variable(tf.tensor2d(values, [3, 4]), true, 'wide'), matrix(6, 3, 4)]
  const group = { name: 'all', algorithm: 'muon', lr: 0.1, weight_decay: 0.5 }
  const optimizer = await openOptimizer(client, { run: 'tfjs-muon', groups: [group], variables: [wide] })
  const turn = (tensor: tf.Tensor) => new Float32Array(tf.transpose(tensor).dataSync())
  const data = turn(wide)
  const run = await client.open({
    run: 'muon',
    groups: [group],
    parameters: [{ name: 'wide', shape: [4, 3], group: 'all', data }],
  })
  for (let step = 1; step <= 2; step++) {
    const receipt = await optimizer.applyGradientsAsync({ wide: tall })
    t.equal(receipt.digest, (await run.step({ wide: turn(tall) })).digest)
    t.same(turn(wide), data)
  }
})

t.test('variables without a gradient are skipped, and groups change', async (t) => {
  const [one, two] = ['one', 'two'].map((name) => tf.variable(tf.tensor1d([1, 2]), true, name)) as [
    tf.Variable,
    tf.Variable,
  ]
  const options = {
    groups: [
      { name: 'a', algorithm: 'sgd', lr: 1 },
      { name: 'b', algorithm: 'sgd', lr: 1 },
    ],
    variables: [one, two],
  }
  await t.rejects(openOptimizer(client, { run: 'tfjs-skip', ...options }), /2 groups: say with groupOf/)
  await t.rejects(openOptimizer(client, { run: 'tfjs-skip', ...options, groups: [] }), /there are 0 groups/)
  const preset = {
    run: 'tfjs-preset',
    groups: [{ name: 'all', preset: 'torch' }],
    variables: [tf.variable(matrix(7, 2, 2))],
  }
  await openOptimizer(client, preset)
  const groupOf = (name: string) => (name === 'one' ? 'a' : 'b')
  const optimizer = await openOptimizer(client, { run: 'tfjs-skip', ...options, groupOf })
  const receipt = await optimizer.applyGradientsAsync({ one: tf.tensor1d([1, 1]) }, { groups: { a: { lr: 0.5 } } })
  t.equal(receipt.skipped, 1)
  t.same([...one.dataSync(), ...two.dataSync()], [0.5, 1.5, 1, 2])
  one.assign(tf.tensor1d([10, 20]))
  await optimizer.applyGradientsAsync({ one: tf.tensor1d([2, 2]), two: tf.tensor1d([1, 1]) })
  t.same([...one.dataSync(), ...two.dataSync()], [9, 19, 0, 1], 'the variables have the weights')
})

t.test('what is refused says so, and leaves weights and state together', async (t) => {
  const [good, bad] = ['good', 'bad'].map((name) => tf.variable(tf.tensor1d([1, 2]), true, name)) as [
    tf.Variable,
    tf.Variable,
  ]
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 1 }]
  const optimizer = await openOptimizer(client, { run: 'tfjs-refused', groups, variables: [good, bad] })
  t.same(optimizer.getConfig(), { run: 'tfjs-refused' })
  t.throws(() => optimizer.applyGradients(), /asynchronous: await minimizeAsync/)
  t.throws(() => optimizer.minimize(), /asynchronous/)
  await t.rejects(optimizer.applyGradientsAsync({ none: tf.scalar(1) }), /'none', no variable has this name/)
  const nan = { good: tf.tensor1d([1, 1]), bad: tf.tensor1d([1, Number.NaN]) }
  await t.rejects(optimizer.applyGradientsAsync(nan), { code: 'GRADIENT_NOT_FINITE' })
  t.same([...good.dataSync(), ...bad.dataSync()], [0, 1, 1, 2], 'the update that was applied is there')
  await optimizer.applyGradientsAsync({ ...nan, bad: tf.tensor1d([1, 1]) })
  t.same([...good.dataSync(), ...bad.dataSync()], [0, 1, 0, 1], 'and is not applied again')
  const infinite = () => tf.mul(tf.sum(good), Number.POSITIVE_INFINITY) as Scalar
  await t.rejects(optimizer.minimizeAsync(infinite), { code: 'GRADIENT_NOT_FINITE' })
  const whole = tf.variable(tf.tensor1d([1], 'int32'), true, 'whole')
  const open = { run: 'tfjs-int', groups, variables: [whole] }
  await t.rejects(openOptimizer(client, open), /variable 'whole' is int32, expected float32/)
  t.throws(() => variablesOf({ trainableWeights: [{ read: () => tf.scalar(1) }] }), /of shape \[\] is no variable/)
})

t.test('model.fit is refused in words', async (t) => {
  const made = model()
  const groups = [{ name: 'all', algorithm: 'sgd', lr: 1 }]
  const optimizer = await openOptimizer(client, { run: 'tfjs-fit', groups, variables: variablesOf(made) })
  made.compile({ optimizer, loss: 'meanSquaredError' })
  await t.rejects(made.fit(INPUTS, TARGETS, { verbose: 0 }), /asynchronous: await minimizeAsync/)
})
