import t from 'tap'
import { Device } from '../../src/device/device.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import { Member } from '../../src/run/members/member.js'
import { answered, Place } from '../../src/run/place.js'
import { Plans } from '../../src/run/plans.js'
import { Step } from '../../src/run/step/step.js'
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

/** A gradient of seeded noise. */
function gradientOf(device: Device) {
  const gradient = device.staging.tryReserve(256)!
  gradient.view.set(new Uint8Array(normal(1, 64).buffer))
  return { gradient, ticket: { cancelled: false } }
}

t.test('a step for whose update there is no memory is refused and leaves nothing behind', async (t) => {
  const device = await startDevice()
  const place = new Place(
    device,
    { plans: new Plans(), rowScale: () => undefined },
    { parameter: { ...PARAMETER!, update_bytes: 2 ** 48 } },
  )
  const step = new Step(1, GROUPS)
  step.begin(new Member())
  const asked = gradientOf(device)
  await t.rejects(
    answered((answer) => place.compute(step, asked, answer)),
    { code: 'OVER_CAPACITY', fields: { parameter: 0, step: 1 } },
  )
  t.match({ bytes: device.memory.bytes, applied: place.appliedStep, failed: device.failed }, { bytes: 0, applied: 0 })
  await device.close()
})

t.test('updates lie in one arena while it has room, then in memory of their own', async (t) => {
  const device = await startDevice()
  const half = 2 ** 20
  const updates = [half, half, half].map((bytes) => device.takeUpdate(bytes))
  const owners = updates.map(({ owner }) => owner.pointer)
  t.equal(owners[0], owners[1])
  t.not(owners[2], owners[0])
  const [, , own] = updates
  t.same([own!.pointer, own!.bytes, own!.owner.bytes], [own!.owner.pointer, half, half], 'an allocation of its own')
  for (const update of updates) update.release()
  t.equal(device.takeUpdate(half).owner.pointer, owners[0], 'there is room again')
  await device.close()
})
