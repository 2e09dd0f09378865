import t from 'tap'
import { Device } from '../../src/device/device.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import { Place } from '../../src/run/place.js'
import { normal } from '../service.js'

const GROUPS = new Map([['g', parseGroup({ name: 'g', algorithm: 'adamw' })]])
const [PARAMETER] = parseParameters([{ name: 'p', shape: [64], group: 'g' }], GROUPS)

async function startDevice() {
  return Device.start({
    device: 'cpu',
    onnxruntime_dir: '',
    lanes: 1,
    threads: 1,
    staging_bytes: 2 ** 20,
    state_bytes_limit: 2 ** 20,
  })
}

/** Applies a gradient of seeded noise to the run's place. */
function stepOf(device: Device, step: number) {
  const slot = device.staging.tryReserve(256)!
  device.view(device.stagingBlock).set(new Uint8Array(normal(1, 64).buffer), slot.offset)
  const frame = { groups: {}, gradient_scale: 1, max_logits: new Map() }
  const settings = { frame, groups: GROUPS, gradient_scale: 1 }
  const gradient = { block: device.stagingBlock, offset: slot.offset, bytes: 256 }
  return { step, expected_step: step, settings, gradient, ticket: { cancelled: false }, spend: () => {} }
}

t.test('a step for whose update there is no memory is refused and leaves nothing behind', async (t) => {
  const device = await startDevice()
  const place = new Place(device, { ...PARAMETER!, update_bytes: 2 ** 48 })
  await t.rejects(place.compute(stepOf(device, 1)), { code: 'OVER_CAPACITY', fields: { parameter: 0, step: 1 } })
  t.match({ bytes: device.memory.bytes, applied: place.appliedStep, failed: device.failed }, { bytes: 0, applied: 0 })
  await device.close()
})

t.test('updates lie in one arena while it has room, then in memory of their own', async (t) => {
  const device = await startDevice()
  const half = 2 ** 20
  const updates = [half, half, half].map((bytes) => device.takeUpdate(bytes))
  const blocks = updates.map(({ range }) => range.block.pointer)
  t.equal(blocks[0], blocks[1])
  t.not(blocks[2], blocks[0])
  t.match(updates[2]!.range, { offset: 0, bytes: half })
  for (const { release } of updates) release()
  t.equal(device.takeUpdate(half).range.block.pointer, blocks[0], 'there is room again')
  await device.close()
})
