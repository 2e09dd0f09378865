import t from 'tap'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { normal, RawClient, type Service, startService } from '../service.js'

let service: Service
t.before(async () => {
  service = await startService()
})
t.teardown(() => service.app.close())

type Layout = { shape: number[]; split?: number[]; heads?: number; matrices?: string; blocks: number[][] }

const repeated = (times: number, block: number[]) => Array.from({ length: times }, () => block)
const LAYOUTS: Record<string, Layout> = {
  split: {
    shape: [48, 20],
    split: [8, 30, 10],
    blocks: [
      [8, 20],
      [30, 20],
      [10, 20],
    ],
  },
  'split into a row, a square and a tall block': {
    shape: [38, 12],
    split: [1, 12, 25],
    blocks: [
      [1, 12],
      [12, 12],
      [25, 12],
    ],
  },
  'wide heads': { shape: [48, 20], heads: 4, blocks: repeated(4, [12, 20]) },
  'tall heads': { shape: [48, 10], heads: 2, blocks: repeated(2, [24, 10]) },
  flatten: { shape: [16, 3, 5], matrices: 'flatten', blocks: [[16, 15]] },
  'wide batch': { shape: [3, 16, 24], matrices: 'batch', blocks: repeated(3, [16, 24]) },
  'tall batch': { shape: [2, 2, 24, 16], matrices: 'batch', blocks: repeated(4, [24, 16]) },
  'batch of split': {
    shape: [2, 20, 8],
    matrices: 'batch',
    split: [5, 15],
    blocks: [
      [5, 8],
      [15, 8],
      [5, 8],
      [15, 8],
    ],
  },
}
const OPTIONS: Record<string, object> = {
  muon: {},
  muonclip: { algorithm: 'muonclip' },
  normuon: { second_momentum: 'normuon' },
  'normuon in bfloat16': { second_momentum: 'normuon', momentum_dtype: 'bfloat16' },
}

/** Bytes of the state tensors of a parameter, one after another by name. */
async function stateBytes(run: string, index: number): Promise<Map<string, Uint8Array>> {
  const response = await fetch(`${service.http}/v1/runs/${run}/parameters/${index}/state`)
  const { tensors } = parseSafetensors(Buffer.from(await response.arrayBuffer()))
  tensors.delete('step')
  return new Map([...tensors].map(([name, { data }]) => [name, data]))
}

let runs = 0
for (const [algorithm, options] of Object.entries(OPTIONS)) {
  for (const [name, { blocks, ...layout }] of Object.entries(LAYOUTS)) {
    t.test(`${algorithm}: ${name} is the separate matrices, bit for bit`, async (t) => {
      const run = `run-${runs++}`
      const client = await RawClient.connect(service.url)
      // The factor of adjust_lr_fn is in `scale` where all blocks have the same one, and in `data` otherwise.
      const groups = [{ name: 'g', algorithm: 'muon', adjust_lr_fn: 'none', ...options }]
      const separate = blocks.map((shape, i) => ({ name: `block ${i}`, shape, group: 'g' }))
      const parameters = [{ name: 'whole', group: 'g', ...layout }, ...separate]
      await client.open({ run, groups, parameters })
      const sizes = blocks.map(([rows, cols]) => rows! * cols!)
      const starts = sizes.map((_, i) => sizes.slice(0, i).reduce((sum, size) => sum + size, 0))
      for (const step of [1, 2, 3]) {
        const whole = normal(
          step,
          layout.shape.reduce((product, size) => product * size, 1),
        )
        const parts = starts.map((start, i) => whole.slice(start, start + sizes[i]!))
        await client.step(step, [whole, ...parts])
        const together = Buffer.concat(parts.map((_, i) => client.updates.get(i + 1)!.data))
        t.equal(Buffer.compare(client.updates.get(0)!.data, together), 0, `step ${step}: update`)
      }
      const [kept, ...each] = await Promise.all(parameters.map((_, index) => stateBytes(run, index)))
      t.same([...kept!.keys()], [...each[0]!.keys()])
      for (const [tensor, bytes] of kept!) {
        const together = Buffer.concat(each.map((one) => one.get(tensor)!))
        t.equal(Buffer.compare(bytes, together), 0, tensor)
      }
      await client.close()
    })
  }
}

const floats = (bytes: Uint8Array) => new Float32Array(Uint8Array.from(bytes).buffer)

t.test('blocks whose factors differ are the separate matrices times these, each product rounded once', async (t) => {
  const client = await RawClient.connect(service.url)
  const groups = [{ name: 'g', algorithm: 'muonclip', lr: 0.5 }]
  const heights = [1, 12, 25]
  const separate = heights.map((rows, i) => ({ name: `block ${i}`, shape: [rows, 12], group: 'g' }))
  const parameters = [{ name: 'whole', shape: [38, 12], group: 'g', split: heights }, ...separate]
  await client.open({ run: 'factors', groups, parameters })
  const whole = normal(1, 38 * 12)
  const parts = [whole.slice(0, 12), whole.slice(12, 13 * 12), whole.slice(13 * 12)]
  await client.step(1, [whole, ...parts])
  const [together, ...apart] = parameters.map((_, index) => client.updates.get(index)!)
  t.equal(together!.scale, -0.5)
  const expected = apart.flatMap(({ scale, data }) => [...floats(data)].map((x) => Math.fround(scale / -0.5) * x))
  t.same(floats(together!.data), Float32Array.from(expected))
  await client.close()
})
