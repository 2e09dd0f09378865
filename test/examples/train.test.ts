import { fileURLToPath } from 'node:url'
import t from 'tap'
import { perceptronLesson } from '../../examples/lesson.js'
import { startService } from '../../examples/service.js'
import { adamw, last, muon, type Recipe, train } from '../../examples/train.js'

const SERVER = fileURLToPath(new URL('../../src/server.js', import.meta.url))
const TEXT = Buffer.from('The optimizer is a service, and the service is the optimizer. '.repeat(20))
const COURSE = {
  size: { context: 4, embedding: 4, hidden: 16 },
  steps: 60,
  batch: 64,
  validation: 4096,
  seed: 5,
  corpus: { train: TEXT, validation: TEXT, files: 1 },
}

t.test('through the service', async (t) => {
  const service = await startService(SERVER)
  t.teardown(service.stop)
  const lesson = await perceptronLesson(COURSE)
  const outcomeOf = (recipe: Recipe, name: string) => train(service.url, lesson, { recipe, name, onStep: () => {} })

  t.test('both recipes learn, from the same start', async (t) => {
    const one = await outcomeOf(adamw(0.01), 'adamw')
    const other = await outcomeOf(muon(0.02, 0.01), 'muon')
    t.same(one.curve[0], other.curve[0])
    for (const { curve } of [one, other]) t.ok(last(curve).loss < 0.7 * curve[0].loss, `${last(curve).loss}`)
    t.equal(last(one.curve).step, COURSE.steps)
  })

  t.test('the same seed gives the same losses', async (t) => {
    const losses = async (name: string) => (await outcomeOf(muon(0.02, 0.01), name)).curve.map(({ loss }) => loss)
    t.same(await losses('first'), await losses('second'))
  })

  t.test('the update RMS is the optimizer’s, whatever the learning rate', async (t) => {
    // Singular values between 0.7 and 1.2 in a 16 x 16 matrix of full rank: an RMS of about 1/4.
    const { updateRms } = await outcomeOf(muon(0.0001, 0.01), 'rms')
    t.ok(updateRms.hidden > 0.15 && updateRms.hidden < 0.3, `${updateRms.hidden}`)
    t.ok(updateRms.rest > 0 && updateRms.rest < 2, `${updateRms.rest}`)
  })

  t.test('every step is reported with the latest loss', async (t) => {
    const steps: number[] = []
    const onStep = (step: number, loss: number) => void (loss > 0 && steps.push(step))
    await train(service.url, lesson, { recipe: adamw(0.01), name: 'reported', onStep })
    t.same(
      steps,
      Array.from({ length: COURSE.steps }, (_, i) => i + 1),
    )
  })
})

t.test('a service that ends before it is ready is an error', async (t) => {
  const folder = t.testdir({ 'server.mjs': `console.log('{"level":40,"msg":"no address here"}')` })
  await t.rejects(startService(`${folder}/server.mjs`), /ended before it was ready/)
})
