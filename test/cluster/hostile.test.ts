import t from 'tap'
import { connect } from '../../src/client/client.js'
import type { WholeBody } from '../../src/cluster/peers/calls.js'
import { type VoteBody, voteBody, voteOf } from '../../src/cluster/peers/vote-text.js'
import type { VotedRecord } from '../../src/cluster/vote.js'
import { FIRST_DIGEST, nextDigest } from '../../src/run/digest.js'
import type { OpenFrame, ReceiptFrame } from '../../src/wire/frame.js'
import { QUICK } from '../client/service.js'
import { RawClient } from '../service.js'
import { CLUSTER_KEY, type Process, startCluster, wholeOf } from './service.js'

const MODEL: Omit<OpenFrame, 'type' | 'protocol' | 'run'> = {
  groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
  parameters: [
    { name: 'a', shape: [2], group: 'all' },
    { name: 'b', shape: [2], group: 'all' },
  ],
}

const processes = await startCluster(t, 2)

const streamOf = ({ url }: Process) => `${url}/v1/stream`

/** A connection to a process, and what it answers to an `open`. */
async function ask(process: Process, frame: Partial<OpenFrame> & { run: string }) {
  const client = await RawClient.connect(streamOf(process))
  t.teardown(() => client.socket.terminate())
  client.send({ type: 'open', protocol: 1, ...frame })
  return { client, answer: await client.next() }
}

/** A whole of two shards, and its control connection. */
async function place(run: string) {
  for (const process of processes) {
    const { client, answer } = await ask(process, { run, shards: 2, ...MODEL })
    if (answer.type === 'placed') return { head: process, control: client, placed: answer }
    t.match(answer, { type: 'moved', run, url: /^ws:.*stream$/ })
  }
  throw new Error('nobody is the head')
}

/** The frame that opens a shard of `MODEL`. */
const shardFrame = (
  { shards, generation }: { shards: readonly { run: string }[]; generation: number },
  index: number,
) => ({
  ...MODEL,
  run: shards[index]!.run,
  parameters: [MODEL.parameters![index]!],
  shard: { index, generation },
})

const processOf = (url: string) => processes.find((process) => streamOf(process) === url)!

t.test('a shard is opened at its process, with the generation of the newest assignment', async (t) => {
  const { placed } = await place('fenced')
  t.match(placed, {
    step: 0,
    resumed: false,
    digest: FIRST_DIGEST,
    shards: [{ parameters: [[0, 1]] }, { parameters: [[1, 2]] }],
  })
  const [first, second] = placed.shards.map(({ url }) => processOf(url))
  t.not(first, second)
  const { shard: _, ...bare } = shardFrame(placed, 0)
  const wrong: [Process, Partial<OpenFrame> & { run: string }, object][] = [
    [first!, bare, { code: 'STALE_GENERATION', message: /no generation/ }],
    [
      first!,
      { ...bare, shard: { index: 0, generation: 7 } },
      { code: 'STALE_GENERATION', message: /generation 7, the assignment has \d+/ },
    ],
    [second!, shardFrame(placed, 0), { code: 'STALE_GENERATION', message: /no shard of this process, but of/ }],
    [first!, { ...bare, shard: { index: 1, generation: placed.generation } }, { code: 'PARAMETER_INVALID' }],
    [
      first!,
      { ...shardFrame(placed, 0), run: 'fenced~7', shard: { index: 7, generation: placed.generation } },
      { code: 'STALE_GENERATION' },
    ],
    [first!, { ...shardFrame(placed, 0), run: 'nobody~0' }, { code: 'RUN_NOT_FOUND' }],
    [first!, { ...shardFrame(placed, 0), run: 'fenced' }, { code: 'PARAMETER_INVALID', message: /no name of a shard/ }],
    [first!, { ...shardFrame(placed, 0), parameters: [MODEL.parameters![1]!] }, { code: 'RUN_MISMATCH' }],
  ]
  for (const [process, frame, expected] of wrong)
    t.match((await ask(process, frame)).answer, { type: 'error', ...expected })
})

t.test('a client that follows no shards is told where the run is, in words', async (t) => {
  const { head, placed } = await place('words')
  const other = processes.find((process) => process !== head)!
  const { answer } = await ask(head, { run: 'words', ...MODEL })
  t.match(answer, {
    code: 'PARAMETER_INVALID',
    message: /spread over 2 processes: open it with a client that follows shards/,
  })
  const { answer: elsewhere } = await ask(other, { run: 'words', ...MODEL })
  t.match(elsewhere, { code: 'PARAMETER_INVALID', message: new RegExp(`is opened at ${streamOf(head)}`) })
  t.equal(placed.shards.length, 2)
})

t.test('what is not built for a whole is refused', async (t) => {
  const { head } = await place('unbuilt')
  const replicas = { rank: 0, world_size: 1, replica: 0, replicas: 2 }
  const wrong: [Partial<OpenFrame>, object][] = [
    [{ member: replicas }, { code: 'PARAMETER_INVALID', message: /cannot have replicas/ }],
    [{ member: replicas, quorum: { min_replicas: 1, deadline_seconds: 1 } }, { message: /replicas, a quorum/ }],
    [{ from: { run: 'other', checkpoint: 'best' } }, { message: /a run that it begins with/ }],
    [{ mode: 'create' }, { code: 'RUN_EXISTS' }],
    [{ checkpoint: 'best' }, { code: 'PARAMETER_INVALID', message: /goes with mode resume/ }],
    [{ checkpoint: 'best', mode: 'resume' }, { code: 'NOT_FOUND' }],
    [{ parameters: [MODEL.parameters![0]!] }, { code: 'RUN_MISMATCH' }],
    [
      { attentions: [{ name: 'x', query_heads: 1, head_dim: 1, query: { parameter: 0 }, key: { parameter: 1 } }] },
      { type: 'error' },
    ],
  ]
  for (const [frame, expected] of wrong)
    t.match((await ask(head, { run: 'unbuilt', shards: 2, ...MODEL, ...frame })).answer, { type: 'error', ...expected })
  const { answer } = await ask(head, { run: 'unbuilt-too', shards: 3, ...MODEL })
  if (answer.type !== 'moved') t.match(answer, { code: 'PARAMETER_INVALID', message: /at most 2/ })
})

t.test('REST has of a whole what there is, and nothing changes a shard behind its back', async (t) => {
  const { head, placed } = await place('rest')
  const shard = placed.shards[0]!
  await ask(processOf(shard.url), shardFrame(placed, 0))
  const at = (process: Process, path: string, init?: RequestInit) => fetch(process.peer + path, init)
  const code = async (response: Response) => ((await response.json()) as { code: string }).code
  t.match(await (await at(head, '/v1/runs')).json(), { wholes: [{}] })
  t.match(await (await at(head, '/v1/runs/rest/parameters')).json(), {
    code: 'NOT_FOUND',
    detail: /^GET \/v1\/runs\/{run}\/parameters: run 'rest' is spread over several processes/,
  })
  t.equal(await code(await at(head, '/v1/runs/none/shards')), 'RUN_NOT_FOUND')
  const home = processOf(shard.url)
  const { runs } = (await (await at(home, '/v1/runs')).json()) as { runs: { name: string; shard_of?: string }[] }
  t.match(
    runs.find(({ name }) => name === shard.run),
    { shard_of: 'rest' },
  )
  t.notOk(
    runs.some(({ name }) => name.startsWith('fenced')),
    'a refused open leaves no shard behind',
  )
  t.equal(await code(await at(home, `/v1/runs/${shard.run}/shards`)), 'NOT_FOUND')
  const body = { body: 'x', headers: { 'content-type': 'application/octet-stream' } }
  t.equal(await code(await at(home, `/v1/runs/${shard.run}/state`, { method: 'PUT', ...body })), 'PARAMETER_INVALID')
  t.equal(
    await code(await at(home, `/v1/runs/${shard.run}/steps?step=1`, { method: 'POST', ...body })),
    'PARAMETER_INVALID',
  )
  const json = { method: 'POST', headers: { 'content-type': 'application/json' } }
  for (const process of processes) {
    const response = await at(process, '/v1/runs', { ...json, body: JSON.stringify({ run: 'rest', ...MODEL }) })
    t.equal(await code(response), 'PARAMETER_INVALID')
  }
  t.equal((await at(head, '/v1/runs/rest', { method: 'DELETE' })).status, 204)
  t.equal(await code(await at(head, '/v1/runs/rest/shards')), 'RUN_NOT_FOUND')
  t.equal(await code(await at(home, `/v1/runs/${shard.run}`)), 'RUN_NOT_FOUND')
})

t.test('a control connection takes end and checkpoint, one at a time', async (t) => {
  const { control } = await place('control')
  control.send({ type: 'step', step: 1 })
  t.match(await control.next(), { code: 'FRAME_UNEXPECTED' })
  for (const [frame, expected] of [
    [{ type: 'end', step: 1, skipped: [0] }, { code: 'FRAME_UNEXPECTED' }],
    [
      { type: 'end', step: 7 },
      { code: 'STEP_CONFLICT', expected_step: 1 },
    ],
    [{ type: 'checkpoint' }, { code: 'PARAMETER_INVALID' }],
  ] as const) {
    const { control } = await place('control')
    control.send(frame)
    t.match(await control.next(), expected)
  }
  const { control: waiting } = await place('control')
  waiting.send({ type: 'end', step: 1 })
  waiting.send({ type: 'end', step: 1 })
  t.match(await waiting.next(), { code: 'FRAME_UNEXPECTED' })
})

/** A vote that fits a shard that has skipped its only parameter in step 1. */
function skippedVote({ generation }: WholeBody, shard: number, change: Partial<VoteBody> = {}): VoteBody {
  const records: VotedRecord[] = [{ gradient_square: 0 }]
  const digest = nextDigest(FIRST_DIGEST, 1, records)
  const seconds = { receive: 0, queue: 0, compute: 0, send: 0 }
  const receipt: ReceiptFrame = {
    type: 'receipt',
    ...{ step: 1, replayed: false, applied: 0, skipped: 1, gradient_norm: 0, groups: {} },
    ...{ clipped_heads: {}, digest, durable: false, seconds },
  }
  return { ...voteBody({ generation, shard, step: 1, records, receipt }), ...change }
}

t.test('votes: forged, of others, repeated, differing, late', async (t) => {
  const { head, control } = await place('votes')
  const { body } = await wholeOf(processes, 'votes')
  const vote = async (sent: VoteBody, key = CLUSTER_KEY) => {
    const response = await fetch(`${head.peer}/v1/runs/votes/votes`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', authorization: `Bearer ${key}` },
      body: JSON.stringify(sent),
    })
    return response.status === 204 ? 'taken' : ((await response.json()) as { code: string }).code
  }
  const own = skippedVote(body, 0)
  t.equal(await vote(own, 'another-key-of-nobody'), 'FORBIDDEN', "a key that is not the cluster's")
  t.equal(await vote({ ...own, generation: body.generation - 1 }), 'STALE_GENERATION')
  t.equal(await vote({ ...own, step: 2 }), 'STEP_CONFLICT')
  t.equal(await vote({ ...own, shard: 2 }), 'PARAMETER_INVALID', 'a shard that there is not')
  t.equal(await vote({ ...own, records: '' }), 'PARAMETER_INVALID', 'no records')
  t.equal(await vote({ ...own, records: 'AQ==' }), 'REQUEST_INVALID', 'half a record')
  t.equal(await vote({ ...own, records: 'BA==' }), 'REQUEST_INVALID', 'a record of another kind')
  t.equal(
    await vote({ ...own, receipt: { ...own.receipt, digest: 'a'.repeat(64) } }),
    'STEP_CONFLICT',
    'a digest of its own',
  )
  control.send({ type: 'end', step: 1 })
  t.equal(await vote(own), 'taken')
  t.equal(await vote(own), 'taken', 'again')
  const differs = skippedVote(body, 0, { records: 'AgQAAAAAAIA/' })
  t.not(await vote({ ...differs, receipt: { ...own.receipt, digest: 'b'.repeat(64) } }), 'taken', 'another one')
  t.equal((await wholeOf(processes, 'votes')).body.step, 0, 'one shard alone commits nothing')
  t.equal(await vote(skippedVote(body, 1)), 'taken')
  t.match(await control.next(), {
    type: 'receipt',
    step: 1,
    replayed: false,
    skipped: 2,
    digest: nextDigest(FIRST_DIGEST, 1, [{}, {}]),
  })
  t.equal(await vote(own), 'taken', 'late, and the same')
  t.equal(
    await vote({ ...own, receipt: { ...own.receipt, digest: 'b'.repeat(64) } }),
    'STEP_CONFLICT',
    'late, and another one',
  )
  control.send({ type: 'end', step: 1 })
  t.match(await control.next(), { type: 'receipt', step: 1, replayed: true })
})

t.test('a vote comes out of its text as it went in, with -0 and row scales', async (t) => {
  const applied = {
    gradient_scale: 1,
    gradientFingerprint: 2n ** 64n - 1n,
    updateFingerprint: 1n,
    scale: -0,
    decay: 1e-300,
  }
  const receipt: ReceiptFrame = {
    type: 'receipt',
    ...{ step: 1, replayed: false, applied: 1, skipped: 1, gradient_norm: 2, groups: {} },
    ...{ clipped_heads: {}, digest: '', durable: true, seconds: { receive: 0, queue: 0, compute: 0, send: 0 } },
  }
  const records: VotedRecord[] = [
    { applied, gradient_square: 4 },
    { gradient_square: 0, row_scale: Uint8Array.of(0, 0, 128, 63) },
    { applied, gradient_square: 0.1, row_scale: Uint8Array.of(0, 0, 128, 63, 1, 2, 3, 4) },
  ]
  const vote = { generation: 1, shard: 0, step: 1, records, receipt }
  const read = voteOf(JSON.parse(JSON.stringify(voteBody(vote))))
  t.strictSame(read, vote)
  t.ok(Object.is(read.records[0]!.applied!.scale, -0))
  const cut = voteBody(vote).records.slice(0, -4)
  t.throws(() => voteOf({ ...voteBody(vote), records: cut }), { code: 'REQUEST_INVALID' })
})

t.test('a process is the head of so many wholes and no more', async (t) => {
  const [one, other] = await startCluster(t, 2, { max_runs: 1 })
  const both = [one!, other!]
  const answers = []
  for (let i = 0; i < 4; i++)
    for (const process of both) {
      const { answer } = await ask(process, { run: `many-${i}`, shards: 2, ...MODEL })
      if (answer.type !== 'moved') answers.push(answer)
    }
  t.equal(answers.length, 4)
  const refused = answers.filter(({ type }) => type === 'error')
  t.ok(refused.length >= 2)
  for (const answer of refused) t.match(answer, { code: 'OVER_CAPACITY', message: /the head of 1 runs/ })
})

t.test('processes of different keys refuse each other, and the client hears of it', async (t) => {
  const [one, other] = await startCluster(t, 2)
  await other!.stop()
  await other!.start({ cluster_key: 'another-key-of-another-cluster' })
  const both = [one!, other!]
  const refusals = await Promise.all(
    both.map(async (process, i) => {
      const client = await connect(process.url, { ...QUICK, retries: 1 })
      t.teardown(() => client.close())
      return client.open({ ...MODEL, run: `split-${i}`, shards: 2, parameters: parameters() }).catch((error) => error)
    }),
  )
  for (const refusal of refusals)
    t.match(refusal, { code: 'PEER_FAILED', message: /every process of peers needs the same key of the cluster/ })
})

const parameters = () => MODEL.parameters!.map((parameter) => ({ ...parameter, data: new Float32Array(2) }))
