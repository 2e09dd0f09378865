import { constants } from 'node:buffer'
import fc from 'fast-check'
import t from 'tap'
import { encodeWithData } from '../../src/wire/codec.js'
import { bytesOf, normal, RawClient, type Service, startService } from '../service.js'

const MiB = 2 ** 20
const GROUPS = [
  { name: 'muon', algorithm: 'muon', second_momentum: 'normuon' },
  { name: 'muonclip', algorithm: 'muonclip' },
  { name: 'adamw', algorithm: 'adamw', amsgrad: true },
  { name: 'adam', algorithm: 'adam' },
  { name: 'rmsprop', algorithm: 'rmsprop', momentum: 0.5 },
  { name: 'sgd', algorithm: 'sgd', momentum: 0.9 },
]
/** One parameter of every algorithm, each but the last larger than an arena of 1 MiB; of some elements in 16 bits. */
const PARAMETERS = [
  { name: 'muon', shape: [768, 400], group: 'muon' },
  { name: 'split', shape: [600, 1000], split: [200, 400], group: 'muonclip', gradient_dtype: 'bfloat16' },
  { name: 'adamw', shape: [300_001], group: 'adamw' },
  { name: 'adam', shape: [700_001], group: 'adam', gradient_dtype: 'float16', update_dtype: 'bfloat16' },
  { name: 'rmsprop', shape: [270_000], group: 'rmsprop' },
  { name: 'sgd', shape: [2, 150_000], group: 'sgd' },
  { name: 'small', shape: [1000], group: 'sgd' },
]
const STEPS = [1, 2, 3]

function gradient(step: number, index: number): Uint8Array {
  const { shape, gradient_dtype = 'float32' } = PARAMETERS[index]!
  const values = normal(
    100 * step + index,
    shape.reduce((a, b) => a * b, 1),
  )
  if (gradient_dtype === 'float32') return bytesOf(values)
  // The upper half of a float32 is a bfloat16; without its highest exponent bit it is a finite float16, too.
  return bytesOf(new Uint16Array(values.buffer).filter((_, i) => i % 2 === 1).map((bits) => bits & 0xbfff))
}
const GRADIENTS = STEPS.map((step) => PARAMETERS.map((_, index) => gradient(step, index)))

/** Sends the steps in the given order, each gradient cut at what `cut` answers; the digest and all updates of each. */
async function train(client: RawClient, order: readonly number[], cut: () => number): Promise<string[]> {
  const seen: string[] = []
  for (const step of STEPS) {
    for (const parameter of order) {
      const bytes = GRADIENTS[step - 1]![parameter]!
      for (let offset = 0, length = 0; offset < bytes.length; offset += length) {
        length = Math.min(cut(), bytes.length - offset)
        const data = bytes.subarray(offset, offset + length)
        client.socket.send(encodeWithData({ type: 'gradient', parameter, step, offset }, data))
      }
    }
    client.send({ type: 'end', step })
    seen.push((await client.expect('receipt')).digest)
    for (const index of PARAMETERS.keys()) {
      const { data, gradient_norm, update_rms } = client.updates.get(index)!
      seen.push(`${gradient_norm} ${update_rms} ${data.toString('latin1')}`)
    }
  }
  return seen
}

async function opened({ url }: Service, run: string): Promise<RawClient> {
  const client = await RawClient.connect(url)
  await client.open({ run, groups: GROUPS, parameters: PARAMETERS })
  return client
}

t.test('gradients larger than the arena have the digests and updates that they have in a large one', async () => {
  const large = await startService({ lanes: 1, staging_bytes: 64 * MiB })
  const first = await opened(large, 'r')
  const expected = await train(first, [...PARAMETERS.keys()], () => MiB)
  await first.close()
  await large.app.close()
  const small = await startService({ lanes: 2, staging_bytes: MiB })
  const course = fc.record({
    order: fc.shuffledSubarray([...PARAMETERS.keys()], { minLength: PARAMETERS.length }),
    cuts: fc.infiniteStream(fc.oneof(fc.integer({ min: 3000, max: 70_000 }), fc.integer({ min: 1, max: 4 * MiB }))),
  })
  let runs = 0
  const property = fc.asyncProperty(course, async ({ order, cuts }) => {
    const run = `run${++runs}`
    const client = await opened(small, run)
    const seen = await train(client, order, () => cuts.next().value)
    await client.close()
    await small.runs.delete(run)
    const { staging, memory, admittedBytes } = small.device
    return seen.join() === expected.join() && staging.used === 0 && memory.bytes === 0 && admittedBytes === 0
  })
  await fc.assert(property, { seed: 5, numRuns: 6 })
  await small.app.close()
})

t.test('a run of such gradients is computed again from its journal', async (t) => {
  const settings = { lanes: 1, staging_bytes: MiB, data: t.testdir(), durability: 'journal', checkpoint_steps: 0 }
  const service = await startService(settings)
  const client = await opened(service, 'r')
  const seen = await train(client, [...PARAMETERS.keys()], () => MiB)
  await client.close()
  const digest = seen.at(-PARAMETERS.length - 1)
  await service.app.close()
  const again = await startService(settings)
  await again.restored
  const heir = await RawClient.connect(again.url)
  t.match(await heir.open({ run: 'r', mode: 'resume' }), { step: STEPS.length, digest, resumed: true })
  t.equal(again.runs.keeper('r').store.newest?.step, 0, 'no checkpoint has a step of it')
  t.equal(again.device.staging.used, 0)
  await heir.close()
  await again.app.close()
})

t.test('what the memory has no room for is refused at open, with both numbers and the setting', async (t) => {
  const service = await startService({ lanes: 1, staging_bytes: MiB, state_bytes_limit: 4 * MiB })
  const client = await RawClient.connect(service.url)
  const open = (elements: number) => {
    const parameters = [{ name: 'w', shape: [elements], group: 'g' }]
    client.send({ type: 'open', protocol: 1, run: 'r', groups: [{ name: 'g', algorithm: 'sgd' }], parameters })
  }
  // State, update and gradient have 4 bytes of each element.
  open(MiB)
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message: `run 'r' needs ${12 * MiB} bytes of memory on cpu, ${4 * MiB} are left: delete a run, or start the service with a larger --state-bytes-limit`,
  })
  open(2 ** 34)
  t.match(await client.expect('error'), {
    code: 'OVER_CAPACITY',
    message:
      constants.MAX_LENGTH < 2 ** 36
        ? `parameter 'w' has tensors of ${2 ** 36} bytes, node ${process.version} reaches ${constants.MAX_LENGTH}: run the service on a newer one`
        : /^run 'r' needs \d+ bytes/,
  })
  open(MiB / 3 - ((MiB / 3) % 16))
  await client.expect('opened')
  await client.close()
  await service.app.close()
})
