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
    const comparable = ({ seconds: _, ...receipt }: (typeof one.receipts)[number]) => receipt
    t.same(other.receipts.map(comparable), one.receipts.map(comparable))
    const { body } = await wholeOf(processes, `over-${shards}`)
    t.match(body, { step: STEPS, digest: one.run.digest })
    t.same(await stateOfShards(body), state)
    t.equal(new Set(body.shards.map(({ peer }) => peer)).size, shards)
  }
})
