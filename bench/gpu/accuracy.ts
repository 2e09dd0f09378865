import { readFileSync, writeFileSync } from 'node:fs'
import { Device } from '../../src/device/device.js'
import type { Job } from '../../src/device/job.js'
import type { Tensor } from '../../src/device/memory.js'
import { planStep } from '../../src/optimizer/algorithms/algorithm.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters, stateBytes } from '../../src/optimizer/parameter.js'
import type { GroupDeclaration } from '../../src/wire/frame.js'

/**
 * Computes two steps of every case in a folder's cases.json on the GPU, both with the case's gradient, and writes the
 * second update and the first state tensor. accuracy.py makes the cases and judges the results.
 */
type Case = { name: string; shape: number[]; dtype: string; group: GroupDeclaration }

const folder = process.argv[2]
const cases: Case[] = JSON.parse(readFileSync(`${folder}/cases.json`, 'utf8'))
const device = await Device.start({
  ...{ device: 'cuda', onnxruntime_dir: process.env.MUOND_ONNXRUNTIME_DIR ?? '', lanes: 1, threads: 0 },
  ...{ staging_bytes: 1 << 20, state_bytes_limit: 0 },
})
for (const { name, shape, dtype, group: declared } of cases) {
  const group = parseGroup({ ...declared, name: 'g' })
  const raw = { name, shape, group: 'g', gradient_dtype: dtype, update_dtype: 'float32' }
  const [parameter] = parseParameters([raw], new Map([['g', group]]))
  const { gradient_bytes, update_bytes } = parameter
  const plan = planStep(parameter, group, { step: 1, replay: false })
  const demand = { plan, gradient_bytes, update_bytes, state_bytes: stateBytes(parameter) }
  device.admit([demand], name)
  await device.load([demand])
  const gradient = device.allocateHost(parameter.gradient_bytes)
  const update = device.allocateHost(parameter.update_bytes)
  gradient.view.set(readFileSync(`${folder}/${name}.gradient`))
  let state: Tensor[] | undefined
  for (const step of [1, 2]) {
    const next = parameter.state.map(({ bytes }) => device.memory.allocate(bytes))
    await compute({
      plan: planStep(parameter, group, { step, replay: false }),
      gradient,
      gradient_scale: 1,
      state: state?.map(({ pointer }) => pointer),
      next: next.map(({ pointer }) => pointer),
      update,
    })
    for (const tensor of state ?? []) device.memory.release(tensor)
    state = next
  }
  writeFileSync(`${folder}/${name}.update`, update.view)
  if (state) writeFileSync(`${folder}/${name}.state`, Buffer.concat([...device.read([state[0]])]))
  for (const tensor of state ?? []) device.memory.release(tensor)
  for (const region of [gradient, update]) region.release()
}
await device.close()

async function compute(job: Job): Promise<void> {
  const result = await device.run(() => job, { cancelled: false })
  if (result?.outcome !== 'computed') throw new Error(`the device answered ${result?.outcome}`)
}
