import t from 'tap'
import { known, train, undisturbed } from '../run/trainer.js'
import { startService } from '../service.js'
import { CUDA, NO_GPU } from './gpu.js'

const ON_GPU = { skip: NO_GPU, timeout: 240_000 }
const LAST = 12

t.test('a run on a GPU is interrupted and goes on with the same bits', ON_GPU, async (t) => {
  const plain = await startService(CUDA)
  const reference = await undisturbed(plain, LAST)
  await plain.app.close()
  for (const durability of ['checkpoint', 'journal']) {
    const settings = { ...CUDA, data: `${t.testdir({})}/${durability}`, durability, checkpoint_steps: 5 }
    const service = await startService(settings)
    const before = await train(service, { last: 7 })
    t.same(known(before.traces), known(reference.slice(0, 7)))
    await before.client.close()
    await service.app.close()
    const again = await startService(settings)
    const after = await train(again, { last: LAST, open: { mode: 'resume' } })
    t.match(after.opened, { step: durability === 'journal' ? 7 : 5, resumed: true, note: undefined })
    t.same(known(after.traces), known(reference.slice(after.opened.step)))
    await after.client.close()
    await again.app.close()
  }
})

t.test('a run moves from a GPU to the CPU and back, and each move is said', ON_GPU, async (t) => {
  const data = t.testdir({})
  let step = 0
  for (const device of ['cuda', 'cpu', 'cuda']) {
    for (const durability of ['journal', 'checkpoint']) {
      const service = await startService({ ...CUDA, device, data, durability, checkpoint_steps: 5 })
      const { client, opened, traces } = await train(service, { last: step + 7 })
      t.equal(opened.step, step, `${device}, ${durability}: no step is lost`)
      t.equal(opened.note !== undefined, step > 0 && durability === 'journal')
      t.equal(traces.length, 7)
      step += 7
      await client.close()
      await service.drain()
    }
  }
})
