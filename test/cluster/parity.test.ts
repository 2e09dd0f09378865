import { createHash } from 'node:crypto'
import t, { type Test } from 'tap'
import { type Client, connect } from '../../src/client/client.js'
import type { WholeBody } from '../../src/cluster/peers/calls.js'
import { gradientsOf, modelOf, weightsOf } from '../client/model.js'
import { QUICK } from '../client/service.js'
import { type Process, startCluster, wholeOf } from './service.js'

const STEPS = 3

/** An attention whose query and key are two of the matrices, so that QK-clip has work in one shard. */
const ATTENTION = {
  ...{ name: 'a', threshold: 1, query_heads: 2, head_dim: 4 },
  query: { parameter: 0 },
  key: { parameter: 1 },
}
const LOGITS = { a: [3, 0.5] }

async function clientOf(t: Test, { url }: Process): Promise<Client> {
  const client = await connect(url, QUICK)
  t.teardown(() => client.close())
  return client
}

/** Some steps of a model whose third step skips the last parameter, which QK-clip scales in no step. */
async function train(client: Client, name: string, options: { shards?: number } = {}) {
  const model = modelOf(name)
  const run = await client.open({ ...model, attentions: [ATTENTION], ...options })
  const receipts = []
  for (let step = 1; step <= STEPS; step++) {
    const gradients = gradientsOf(model.parameters, step)
    const last = gradients.length - 1
    const given = step === 3 ? gradients.slice(0, last) : gradients
    const groups = step === 2 ? { hidden: { lr: 0.01 }, rest: { lr: 0 } } : undefined
    receipts.push(await run.step(given, { max_logits: LOGITS, groups, ...(step === 3 && { skipped: [last] }) }))
  }
  return { run, receipts, weights: weightsOf(model.parameters) }
}

/** The bytes of every state tensor of a run, by the parameter's index. */
async function stateOf(peer: string, run: string, parameters: readonly number[]): Promise<Map<number, string>> {
  const states = parameters.map(async (index, local) => {
    const response = await fetch(`${peer}/v1/runs/${run}/parameters/${local}/state`)
    const bytes = Buffer.from(await response.arrayBuffer())
    // The header has the name of the run.
    const tensors = bytes.subarray(8 + Number(bytes.readBigUInt64LE()))
    return [index, createHash('sha256').update(tensors).digest('hex')] as const
  })
  return new Map(await Promise.all(states))
}

async function stateOfShards({ shards }: WholeBody): Promise<Map<number, string>> {
  const indices = (ranges: number[][]) =>
    ranges.flatMap(([start, stop]) => Array.from({ length: stop! - start! }, (_, i) => start! + i))
  const all = await Promise.all(shards.map(({ peer, run, parameters }) => stateOf(peer, run, indices(parameters))))
  return new Map(all.flatMap((states) => [...states]).sort(([one], [other]) => one - other))
}

t.test('any number of shards has the weights, state, receipts and digests of one process', async (t) => {
  const processes = await startCluster(t, 4)
  const client = await clientOf(t, processes[0]!)
  const one = await train(client, 'one', { shards: 1 })
  const home = processes.find(({ app }) => app.runs.has('one'))!
  const state = await stateOf(home.peer, 'one', [0, 1, 2, 3, 4])
  for (const shards of [2, 4]) {
    const other = await train(client, `over-${shards}`, { shards })
    t.equal(other.run.digest, one.run.digest)
    t.same(other.weights, one.weights)
    t.same(other.run.members, one.run.members)
    t.same(other.run.opened.attentions, one.run.opened.attentions)
    const comparable = ({ seconds: _, ...receipt }: (typeof one.receipts)[number]) => receipt
    t.same(other.receipts.map(comparable), one.receipts.map(comparable))
    const { head, body } = await wholeOf(processes, `over-${shards}`)
    t.match(body, { step: STEPS, digest: one.run.digest })
    t.same(await stateOfShards(body), state)
    t.equal(new Set(body.shards.map(({ peer }) => peer)).size, shards)
    t.equal((await fetch(`${head.peer}/v1/runs/over-${shards}`, { method: 'DELETE' })).status, 204)
    await t.rejects(wholeOf(processes, `over-${shards}`))
  }
})

t.test('an attention with biases is told, and clips, as in one process', async (t) => {
  const processes = await startCluster(t, 2)
  const client = await clientOf(t, processes[0]!)
  const biases = { query_bias: { parameter: 3 }, key_bias: { parameter: 3, first_row: 8 } }
  const clipped = async (name: string, shards: number) => {
    const model = modelOf(name)
    const run = await client.open({ ...model, attentions: [{ ...ATTENTION, ...biases }], shards })
    const { clipped_heads } = await run.step(gradientsOf(model.parameters, 1), { max_logits: LOGITS })
    const { attentions } = run.opened
    return { attentions, clipped_heads, digest: run.digest, weights: weightsOf(model.parameters) }
  }
  const alone = await clipped('biased', 1)
  t.same(alone.clipped_heads, { a: 1 })
  t.match(alone.attentions, [biases])
  t.same(await clipped('biased-shards', 2), alone)
  const other = { ...modelOf('biased-shards'), attentions: [ATTENTION], shards: 2, mode: 'resume' } as const
  await t.rejects(client.open(other), { code: 'RUN_MISMATCH', message: /'a'/ })
})

/** The ranges of each of two members: the first and the second half of every parameter. */
const halves = (parameters: ReturnType<typeof modelOf>['parameters'], rank: number) =>
  parameters.map(({ data, ...declaration }) => {
    const middle = Math.floor(data.length / 2)
    const [start, stop] = rank === 0 ? [0, middle] : [middle, data.length]
    return { ...declaration, data: data.subarray(start, stop), ranges: [[start, stop]] }
  })

t.test('two members of a run of two shards have what one member of one process has', async (t) => {
  const processes = await startCluster(t, 2)
  const clients = await Promise.all(processes.map((process) => clientOf(t, process)))
  const model = modelOf('alone')
  const alone = await clients[0]!.open({ ...model, shards: 1 })
  const shared = modelOf('together')
  const members = await Promise.all(
    clients.map((client, rank) => {
      const parameters = halves(shared.parameters, rank)
      return client.open({ ...shared, parameters, shards: 2, member: { rank, world_size: 2 } })
    }),
  )
  t.same(
    members[0]!.members.map(({ rank }) => rank),
    [0, 1],
  )
  for (let step = 1; step <= 2; step++) {
    const gradients = gradientsOf(model.parameters, step)
    const receipt = await alone.step(gradients)
    const receipts = await Promise.all(
      members.map((member, rank) => {
        const middle = (length: number) => Math.floor(length / 2)
        const half = (gradient: (typeof gradients)[number]) =>
          rank === 0 ? gradient.subarray(0, middle(gradient.length)) : gradient.subarray(middle(gradient.length))
        return member.step(gradients.map(half))
      }),
    )
    for (const { digest, replayed } of receipts)
      t.match({ digest, replayed }, { digest: receipt.digest, replayed: false })
  }
  t.same(weightsOf(shared.parameters), weightsOf(model.parameters))
  t.same(members[1]!.members, [
    { rank: 0, connected: true },
    { rank: 1, connected: true },
  ])
})

t.test('a gradient that is refused is told by its index in the whole, and can be left out', async (t) => {
  const processes = await startCluster(t, 2)
  const client = await clientOf(t, processes[0]!)
  const model = modelOf('not-finite')
  const run = await client.open({ ...model, shards: 2 })
  const gradients = gradientsOf(model.parameters, 1)
  const wrong = gradients.map((gradient, i) =>
    i === 0 || i === 3 ? new Float32Array(gradient.length).fill(NaN) : gradient,
  )
  await t.rejects(run.step(wrong), {
    code: 'GRADIENT_NOT_FINITE',
    fields: { refused: ['wide', 'norm'] },
  })
  const receipt = await run.step(wrong, { skip_refused: true })
  t.match(receipt, { step: 1, applied: 3, skipped: 2 })
  t.same(receipt.refused.map(({ fields }) => fields.parameter).sort(), [0, 3])
  t.equal(run.opened.attentions.length, 0)
  await t.rejects(run.step(gradients, { max_logits: { none: [1] } }), { code: 'MAX_LOGITS_INVALID' })
})

t.test('gradients travel in memory that the client shares with every shard, and come out the same', async (t) => {
  const processes = await startCluster(t, 2)
  const client = await clientOf(t, processes[0]!)
  const shared = await connect(processes[0]!.url, { ...QUICK, transport: 'shm' })
  t.teardown(() => shared.close())
  const [copied, inPlace] = [modelOf('copied'), modelOf('in-place')]
  const socket = await client.open({ ...copied, shards: 2 })
  const memory = await shared.open({ ...inPlace, shards: 2 })
  t.equal(socket.transport, 'websocket')
  t.equal(memory.transport, 'shm')
  for (let step = 1; step <= 2; step++) {
    const gradients = gradientsOf(copied.parameters, step)
    const views = gradients.map((gradient, index) => {
      const view = memory.gradientView(index)
      view.set(gradient)
      return view
    })
    await socket.step(gradients)
    await memory.step(views)
  }
  t.equal(memory.digest, socket.digest)
  t.same(weightsOf(inPlace.parameters), weightsOf(copied.parameters))
  t.throws(() => memory.gradientView(5), { code: 'PARAMETER_UNKNOWN' })
})
