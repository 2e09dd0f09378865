import t from 'tap'
import { blocksOf, decodeBlocks } from '../../kernels/blocks.js'
import { BLOCK_DTYPES, type BlockDtype, isBlockDtype } from '../../kernels/dtype.js'
import type { Parameter } from '../../src/client/client.js'
import { normal } from '../service.js'
import { QUICK, startProxy } from './service.js'
import { clientOf, fresh, service } from './trainer.js'

const NAMES = Object.keys(BLOCK_DTYPES).filter(isBlockDtype)
const GROUPS = [{ name: 'g', algorithm: 'muon', lr: 0.02 }]
const SHAPE = [24, 32] as const
const SIZE = SHAPE[0] * SHAPE[1]
const parameterOf = (keys: Partial<Parameter> = {}): Parameter => ({
  ...{ name: 'w', shape: SHAPE, group: 'g', data: normal(1, SIZE) },
  ...keys,
})
const gradient = (step: number) => normal(100 + step, SIZE)

function decoded(values: Float32Array, dtype: BlockDtype): Float32Array {
  const found = new Float32Array(values.length)
  decodeBlocks(blocksOf(values, dtype), dtype, found)
  return found
}

for (const dtype of NAMES) {
  t.test(
    `gradients in ${dtype} lead to the weights of those that they decode to, over a connection that breaks`,
    async (t) => {
      const proxy = await startProxy(service.port, [3_500])
      t.teardown(() => proxy.close())
      const [wide, narrow] = [parameterOf(), parameterOf({ gradient_dtype: dtype })]
      const reference = await (await clientOf(t)).open({ run: fresh(), groups: GROUPS, parameters: [wide] })
      const client = await clientOf(t, { ...QUICK, chunk_bytes: 100 }, proxy.url)
      const run = await client.open({ run: fresh(), groups: GROUPS, parameters: [narrow] })
      for (let step = 1; step <= 2; step++) {
        await reference.step([decoded(gradient(step), dtype)])
        const view = run.gradientView('w')
        view.set(gradient(step))
        await run.step([view])
      }
      t.ok(proxy.connections() > 1)
      t.same(narrow.data, wide.data)
    },
  )
}

t.test('updates in blocks are applied as what they decode to', async (t) => {
  const [wide, narrow] = [
    parameterOf({ data: new Float32Array(SIZE) }),
    parameterOf({ data: new Float32Array(SIZE), update_dtype: 'int4_block64' }),
  ]
  const client = await clientOf(t)
  const group = [{ name: 'g', algorithm: 'sgd', lr: 1 }]
  await (await client.open({ run: fresh(), groups: group, parameters: [wide] })).step([gradient(1)])
  await (await client.open({ run: fresh(), groups: group, parameters: [narrow] })).step([gradient(1)])
  t.same(
    narrow.data,
    decoded(gradient(1), 'int4_block64').map((value) => 0 - value),
  )
  t.same(
    wide.data,
    gradient(1).map((value) => 0 - value),
  )
})

t.test('gradients in blocks are given as float32, and memory is shared for none', async (t) => {
  const auto = await clientOf(t, {})
  const parameters = [parameterOf({ gradient_dtype: 'int8_block256' })]
  const run = await auto.open({ run: fresh(), groups: GROUPS, parameters })
  t.equal(run.transport, 'websocket')
  await t.rejects(run.step([new Uint16Array(SIZE)]), { code: 'DTYPE_UNSUPPORTED', message: /is a Uint16Array/ })
  const shm = await clientOf(t, { transport: 'shm' })
  await t.rejects(shm.open({ run: fresh(), groups: GROUPS, parameters }), {
    code: 'REQUEST_INVALID',
    message: /'w' travel in blocks, over the socket alone/,
  })
  const ranges = [[0, 100]] as const
  const part = parameterOf({ gradient_dtype: 'int8_block256', ranges, data: new Float32Array(100) })
  await t.rejects(auto.open({ run: fresh(), groups: GROUPS, parameters: [part], member: { rank: 0, world_size: 1 } }), {
    code: 'PARAMETER_INVALID',
    message: /ranges\[0\] is \[0,100\], expected multiples of 256/,
  })
})
