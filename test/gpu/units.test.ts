import t from 'tap'
import { normal, RawClient, startService } from '../service.js'
import { CUDA, NO_GPU } from './gpu.js'

const GROUPS = [
  { name: 'muon', algorithm: 'muon' },
  { name: 'adamw', algorithm: 'adamw' },
]
const SHAPES = [
  [96, 64],
  [512, 1024],
  [33, 77],
  [256, 256],
] as const
const PARAMETERS = [
  ...SHAPES.map((shape, i) => ({ name: `m${i}`, shape: [...shape], group: 'muon' })),
  { name: 'bias', shape: [1001], group: 'adamw' },
]
const COUNTS = [...SHAPES.map(([rows, cols]) => rows * cols), 1001]

/** Three steps; every update's bytes and the digest. */
async function train(device: string) {
  const service = await startService({ ...CUDA, device })
  const { units } = service.device.backend
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: PARAMETERS })
  const updates: string[] = []
  let digest = ''
  for (let step = 1; step <= 3; step++) {
    const gradients = COUNTS.map((count, i) => normal(step * 100 + i, count))
    digest = (await client.step(step, gradients)).digest
    for (const index of PARAMETERS.keys()) updates.push(client.updates.get(index)!.data.toString('base64'))
  }
  const [run] = service.runs.list()
  const placed = run!.grant.units
  await client.close()
  await service.app.close()
  return { units: units.length, placed, updates, digest }
}

// Two GPUs where there are two of them; else two units with lanes and memory of their own on one.
const TWO = process.env.MUOND_TEST_GPUS === '2' ? 'cuda:0,1' : 'cuda:0,0'

t.test(`two units (${TWO}) give the bits that one gives`, { skip: NO_GPU, timeout: 120_000 }, async (t) => {
  const [one, two] = [await train('cuda:0'), await train(TWO)]
  t.same([one.units, two.units], [1, 2])
  t.same([...new Set(two.placed)].sort(), [0, 1], 'both have parameters')
  t.equal(two.digest, one.digest)
  t.ok(two.updates.every((update, i) => update === one.updates[i]))
})
