import { once } from 'node:events'
import { mkdtempSync } from 'node:fs'
import { request } from 'node:http'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { normal, RawClient, startService, told, turn, until } from '../service.js'
import { fileOf, post, postStep, refused, type Tensor, take } from './plain.js'

const GROUPS = [
  { name: 'hidden', algorithm: 'muonclip', lr: 0.02 },
  { name: 'rest', algorithm: 'adamw', lr: 0.01 },
]
const PARAMETERS = [
  { name: 'q', shape: [8, 12], group: 'hidden', update_dtype: 'bfloat16' },
  { name: 'k', shape: [8, 12], group: 'hidden' },
  { name: 'b', shape: [5], group: 'rest', gradient_dtype: 'bfloat16' },
  { name: 'scalar', shape: [], group: 'rest' },
  { name: '__proto__', shape: [3], group: 'rest', update_dtype: 'float16' },
]
const rows = (parameter: number) => ({ parameter })
const ATTENTIONS = [{ name: 'a', threshold: 10, query_heads: 2, head_dim: 4, query: rows(0), key: rows(1) }]
const DECLARED = { groups: GROUPS, parameters: PARAMETERS, attentions: ATTENTIONS }

/** The upper halves of float32 numbers. */
const bfloat16 = (values: Float32Array) => Uint16Array.from(new Uint32Array(values.buffer), (bits) => bits >>> 16)

const gradientsOf = (step: number) =>
  PARAMETERS.map(({ shape, gradient_dtype }, i) => {
    const values = normal(
      100 * step + i,
      (shape as number[]).reduce((product, size) => product * size, 1),
    )
    return gradient_dtype === 'bfloat16' ? bfloat16(values) : values
  })

const tensorsOf = (step: number, indices = [0, 1, 2, 3, 4]): Tensor[] =>
  indices.map((i) => {
    const { name, shape, gradient_dtype } = PARAMETERS[i]!
    return { name, shape, values: gradientsOf(step)[i]!, dtype: gradient_dtype ? 'BF16' : 'F32' }
  })

const service = await startService({ lanes: 2 })
const { http, url } = service
t.teardown(() => service.app.close())

let count = 0
const nameOf = () => `plain-${++count}`
async function made(declared: object = DECLARED): Promise<string> {
  const run = nameOf()
  t.equal((await post(http, { run, ...declared })).status, 201)
  return run
}
async function stream(run: string, frame: object = {}) {
  const client = await RawClient.connect(url)
  return { client, opened: await client.open({ run, ...frame }) }
}

t.test('updates, row scales, receipts and digests are those of the stream', async (t) => {
  const [plain, streamed] = [await made(), nameOf()]
  const { client } = await stream(streamed, DECLARED)
  const logits = { a: [20, 5] }
  const steps = [
    { indices: [4, 2, 0, 1, 3], values: { max_logits: logits }, skipped: [] },
    {
      indices: [1, 3],
      values: { groups: { rest: { lr: 0.5 } }, gradient_scale: 0.5, max_logits: logits },
      skipped: [0, 2, 4],
    },
    { indices: [0, 1, 2, 3, 4], values: {}, skipped: [] },
    { indices: [], values: {}, skipped: [0, 1, 2, 3, 4] },
  ]
  for (const [i, { indices, values, skipped }] of steps.entries()) {
    const step = i + 1
    client.updates.clear()
    client.send({ type: 'step', step, ...values })
    for (const index of indices) client.gradient(index, step, { values: gradientsOf(step)[index]! })
    client.send({ type: 'end', step, skipped })
    const receipt = await client.expect('receipt')
    const names = skipped.map((index) => PARAMETERS[index]!.name)
    const metadata = { ...values, ...(names.length > 0 && { skipped: names }) }
    const answer = await take(http, plain, { step }, fileOf(tensorsOf(step, indices), metadata))
    const { type: _, seconds: __, ...expected } = receipt
    t.match(answer.receipt, expected)
    t.equal(answer.headers.get('muond-digest'), receipt.digest)
    t.equal(answer.headers.get('muond-step'), String(step))
    t.equal(answer.headers.get('muond-replayed'), 'false')
    const found = [...answer.tensors.keys()]
    const wanted = [...client.updates].flatMap(([index, { data, row_scale }]) => {
      const { name } = PARAMETERS[index]!
      return [...(data.length > 0 ? [`update.${name}`] : []), ...(row_scale ? [`row_scale.${name}`] : [])]
    })
    t.same(found.sort(), wanted.sort(), `step ${step} has tensors ${wanted}`)
    for (const [index, { data, row_scale, scale, decay, gradient_norm, update_rms }] of client.updates) {
      const { name, shape } = PARAMETERS[index]!
      const factors = { scale, decay, replayed: false, ...(data.length > 0 && { gradient_norm, update_rms }) }
      t.same(answer.updates[name], factors, name)
      const update = answer.tensors.get(`update.${name}`)
      if (data.length > 0) t.same([update!.shape, Buffer.from(update!.data)], [shape, data])
      if (row_scale) t.same(Buffer.from(answer.tensors.get(`row_scale.${name}`)!.data), row_scale)
    }
  }
  await client.close()
})

t.test('opened says what the stream says, and no connection is left', async (t) => {
  const run = nameOf()
  const created = await post(http, { run, mode: 'create', client: 'a test', ...DECLARED })
  t.match(created, { status: 201, body: { run, epoch: 1, step: 0, resumed: false, ahead: [] } })
  t.notOk('parameters' in created.body, 'what was given is not repeated')
  t.match(await post(http, { run, mode: 'create', ...DECLARED }), { status: 409, body: { code: 'RUN_EXISTS' } })
  const again = await post(http, { run })
  const { client, opened } = await stream(run)
  const { type: _, limits: __, server: ___, epoch, ...expected } = opened
  t.match(again, { status: 200, body: expected })
  t.same([again.body.epoch, epoch], [2, 3])
  t.same(again.body.parameters, opened.parameters)
  t.match(await post(http, { run }), { status: 409, body: { code: 'RUN_BUSY' } })
  t.match(await post(http, { run, takeover: true }), { status: 200 })
  t.match(await client.closed(), { code: 4409 })
})

t.test('what open refuses is refused', async (t) => {
  const run = nameOf()
  const one = { name: 'w', shape: [2], group: 'g' }
  const groups = [{ name: 'g', algorithm: 'sgd' }]
  const nested = Array.from({ length: 100_000 }).fill('[').join('') + Array.from({ length: 100_000 }).fill(']').join('')
  const cases: [number, string, object | string][] = [
    [400, 'REQUEST_INVALID', {}],
    [400, 'REQUEST_INVALID', { run, member: { rank: 0, world_size: 1 } }],
    [400, 'REQUEST_INVALID', { run: '.' }],
    [400, 'REQUEST_INVALID', { run, groups, parameters: [{ ...one, shape: [1.5] }] }],
    [400, 'FRAME_MALFORMED', { run, groups: [{ ...groups[0], lr: null }], parameters: [one] }],
    [
      400,
      'FRAME_MALFORMED',
      `{"run":"${run}","groups":[{"name":"g","algorithm":"sgd","lr":${nested}}],"parameters":[]}`,
    ],
    [404, 'RUN_NOT_FOUND', { run, mode: 'resume' }],
    [422, 'PARAMETER_INVALID', { run }],
    [422, 'PARAMETER_INVALID', { run, groups, parameters: [{ ...one, shape: [0] }] }],
    [422, 'HYPERPARAMETER_INVALID', { run, groups: [{ ...groups[0], lr: 'high' }], parameters: [one] }],
    [422, 'HYPERPARAMETER_INVALID', { run, groups: [{ ...groups[0], weight_decai: 1 }], parameters: [one] }],
    [422, 'DTYPE_UNSUPPORTED', { run, groups, parameters: [{ ...one, gradient_dtype: 'float64' }] }],
    [507, 'OVER_CAPACITY', { run, groups, parameters: [{ ...one, shape: [2 ** 40, 2] }] }],
  ]
  for (const [status, code, body] of cases) {
    const text = typeof body === 'string' ? body : JSON.stringify(body)
    const init = { method: 'POST', headers: { 'content-type': 'application/json' }, body: text }
    const answer = await fetch(`${http}/v1/runs`, init)
    t.match([answer.status, await answer.json()], [status, { code }], text.slice(0, 100))
  }
  for (const [type, status] of [
    ['text/plain', 415],
    ['application/octet-stream', 415],
    ['', 400],
  ] as const) {
    const headers: Record<string, string> = type ? { 'content-type': type } : {}
    const body = type ? { body: Buffer.from(JSON.stringify({ run })) } : {}
    t.equal((await fetch(`${http}/v1/runs`, { method: 'POST', headers, ...body })).status, status, type)
  }
  const long = await post(http, { run, client: 'c'.repeat(2 ** 20) })
  t.match(long, { status: 413, body: { code: 'REQUEST_INVALID' } })
  t.match(await post(http, { run, mode: 'resume' }), { body: { code: 'RUN_NOT_FOUND' } }, 'none of them has made it')
})

t.test('a step counts once: again it is replayed, another one is a conflict', async (t) => {
  const run = await made()
  const first = fileOf(tensorsOf(1), { groups: { rest: { lr: 0.5 } }, max_logits: { a: [20, 5] } })
  const applied = await take(http, run, { step: 1 }, first)
  for (let round = 0; round < 2; round++) {
    const again = await take(http, run, { step: 1 }, first)
    t.equal(again.headers.get('muond-replayed'), 'true')
    t.match(again.receipt, { replayed: true, digest: applied.receipt.digest })
    t.same(again.tensors, applied.tensors)
    t.ok(Object.values(again.updates).every(({ replayed }) => replayed))
  }
  const conflict = { status: 409, code: 'STEP_CONFLICT', expected_step: 2 }
  const other = fileOf(tensorsOf(2), { groups: { rest: { lr: 0.5 } }, max_logits: { a: [20, 5] } })
  t.match(await refused(http, run, { step: 1 }, other), conflict, 'other bytes')
  t.match(await refused(http, run, { step: 1 }, fileOf(tensorsOf(1), { gradient_scale: 2 })), conflict, 'other values')
  for (const step of [3, 7]) t.match(await refused(http, run, { step }, first), conflict, 'a step to come')
  const next = await take(http, run, { step: 2 }, fileOf(tensorsOf(2)))
  t.match(await refused(http, run, { step: 1 }, first), { ...conflict, expected_step: 3 }, 'a step long done')
  const { client, opened } = await stream(run)
  t.match(opened, { step: 2, digest: next.receipt.digest, ahead: [] })
  await client.close()
})

t.test('two at once are one after the other', async (t) => {
  const run = await made()
  const answers = await Promise.all([1, 2, 3].map(() => take(http, run, { step: 1 }, fileOf(tensorsOf(1)))))
  t.same(answers.map(({ receipt }) => receipt.replayed).sort(), [false, true, true])
  t.equal(new Set(answers.map(({ receipt }) => receipt.digest)).size, 1)
  const mixed = await Promise.all([2, 5].map((seed) => postStep(http, run, { step: 2 }, fileOf(tensorsOf(seed)))))
  t.same(mixed.map(({ status }) => status).sort(), [200, 409], 'of two that differ one counts')
  for (const answer of mixed) await answer.arrayBuffer()
})

t.test('wrong files change nothing', async (t) => {
  const run = await made()
  const good = fileOf(tensorsOf(1))
  const [q, ...others] = tensorsOf(1)
  const text = (bytes: Uint8Array, from: string, to: string) =>
    Buffer.from(Buffer.from(bytes).toString('latin1').replace(from, to), 'latin1')
  const cases: [number, string, RegExp, Uint8Array][] = [
    [404, 'PARAMETER_UNKNOWN', /no parameter 'x'/, fileOf([{ ...q!, name: 'x' }, ...others])],
    [404, 'PARAMETER_UNKNOWN', /no parameter 'y'/, fileOf(tensorsOf(1), { skipped: ['y'] })],
    [
      422,
      'SHAPE_MISMATCH',
      /'q' has shape \[12,8\], expected \[8,12\]/,
      fileOf([{ ...q!, shape: [12, 8] }, ...others]),
    ],
    [
      422,
      'DTYPE_UNSUPPORTED',
      /'b' is F16, expected BF16/,
      fileOf(tensorsOf(1).map((one) => (one.name === 'b' ? { ...one, dtype: 'F16' as const } : one))),
    ],
    [409, 'STEP_INCOMPLETE', /step 1 has no gradient of 'q', 'scalar'/, fileOf(tensorsOf(1, [1, 2, 4]))],
    [409, 'STEP_CONFLICT', /'q' has a gradient and is skipped/, fileOf(tensorsOf(1), { skipped: ['q'] })],
    [400, 'REQUEST_INVALID', /key 'weight_decay', expected ones are groups/, fileOf(tensorsOf(1), { weight_decay: 1 })],
    [400, 'REQUEST_INVALID', /no list of the names/, fileOf(tensorsOf(1), { skipped: [3] })],
    [400, 'REQUEST_INVALID', /'groups' is no JSON/, text(fileOf(tensorsOf(1), { groups: {} }), '"{}"', '"{]"')],
    [400, 'FRAME_MALFORMED', /nested more than 8/, fileOf(tensorsOf(1), { groups: { a: { b: [[[[[[[1]]]]]]] } } })],
    [400, 'FRAME_MALFORMED', /step\.groups\.rest is a float/, fileOf(tensorsOf(1), { groups: { rest: 0.5 } })],
    [422, 'HYPERPARAMETER_INVALID', /no group 'none'/, fileOf(tensorsOf(1), { groups: { none: {} } })],
    [422, 'HYPERPARAMETER_INVALID', /lr/, fileOf(tensorsOf(1), { groups: { rest: { lr: -1 } } })],
    [422, 'MAX_LOGITS_INVALID', /a/, fileOf(tensorsOf(1), { max_logits: { a: [1] } })],
    [400, 'REQUEST_INVALID', /within its header/, good.subarray(0, 4)],
    [400, 'REQUEST_INVALID', /header claims/, good.subarray(0, 20)],
    [400, 'REQUEST_INVALID', /header claims/, new Uint8Array(BigInt64Array.of(2n ** 40n).buffer)],
    [400, 'REQUEST_INVALID', /not JSON/, text(good, '{', '<')],
    [400, 'REQUEST_INVALID', /dtype "F64"/, text(good, 'F32', 'F64')],
  ]
  for (const [status, code, detail, body] of cases)
    t.match(await refused(http, run, { step: 1 }, body), { status, code, detail }, String(detail))
  const { refusals } = (await (await fetch(`${http}/v1/runs/${run}/refusals`)).json()) as { refusals: unknown[] }
  t.ok(refusals.length > 10, 'the run knows of them')
  const { client, opened } = await stream(run)
  t.match(opened, { step: 0, ahead: [] })
  await client.close()
  t.equal((await take(http, run, { step: 1 }, good)).receipt.replayed, false)
})

t.test('a file that other writers make is taken: a format, and names that are escaped', async (t) => {
  const run = await made()
  const file = Buffer.from(fileOf(tensorsOf(1), { format: 'pt' }))
  t.equal((await take(http, run, { step: 1 }, file)).receipt.step, 1)
})

t.test('queries and bodies are held against the contract', async (t) => {
  const run = await made()
  const body = fileOf(tensorsOf(1))
  for (const query of ['', '?step=0', '?step=x', '?step=1&stepp=2', '?step=1&takeover=maybe']) {
    const init = { method: 'POST', headers: { 'content-type': 'application/octet-stream' }, body: Buffer.from(body) }
    const answer = await fetch(`${http}/v1/runs/${run}/steps${query}`, init)
    t.match([answer.status, await answer.json()], [400, { code: 'REQUEST_INVALID' }], query)
  }
  const none = await fetch(`${http}/v1/runs/${run}/steps?step=1`, { method: 'POST' })
  t.match([none.status, await none.json()], [400, { detail: /no body/ }])
  t.match(await refused(http, 'nobody', { step: 1 }, body), { status: 404, code: 'RUN_NOT_FOUND' })
})

t.test('a gradient that is not finite is refused, and the same step comes again', async (t) => {
  const run = await made()
  const bad = tensorsOf(1)
  bad[4] = { ...bad[4]!, values: Float32Array.of(1, Number.NaN, 2) }
  const refusal = await refused(http, run, { step: 1 }, fileOf(bad))
  t.match(refusal, { status: 422, code: 'GRADIENT_NOT_FINITE', parameter: 4, step: 1 })
  const answer = await take(http, run, { step: 1 }, fileOf(tensorsOf(1)))
  const [clean, expected] = [await made(), fileOf(tensorsOf(1))]
  t.equal(answer.receipt.digest, (await take(http, clean, { step: 1 }, expected)).receipt.digest)
})

/** How many connections there are, requests for steps counted. */
async function connectionsOf(http: string): Promise<number> {
  const answer = await fetch(`${http}/v1/capabilities`)
  return ((await answer.json()) as { quotas: { connections: { used: number } } }).quotas.connections.used
}

/** A request whose body stops after `bytes`, and the socket below it. */
async function begin(run: string, step: number, bytes: Uint8Array, length: number) {
  const headers = { 'content-type': 'application/octet-stream', 'content-length': length }
  const outgoing = request(`${http}/v1/runs/${run}/steps?step=${step}`, { method: 'POST', agent: false, headers })
  outgoing.on('error', () => {})
  outgoing.write(bytes)
  return outgoing
}

t.test('what a body that is cut off has brought is applied once', async (t) => {
  const parameters = ['first', 'second'].map((name) => ({ name, shape: [64, 64], group: 'g' }))
  const declared = { groups: [{ name: 'g', algorithm: 'muon' }], parameters }
  const file = (seed: number) =>
    fileOf(parameters.map(({ name, shape }, i) => ({ name, shape, values: normal(seed + i, 4096) })))
  const [run, whole] = [await made(declared), await made(declared)]
  const bytes = file(1)
  const cut = await begin(run, 1, bytes.subarray(0, bytes.length - 100), bytes.length)
  await until(() => service.runs.get(run).ahead.length === 1)
  t.ok(service.runs.get(run).connected)
  cut.destroy()
  await until(() => !service.runs.get(run).connected)
  t.match(await refused(http, run, { step: 1 }, file(7)), { code: 'STEP_CONFLICT' }, 'other bytes for what is applied')
  const answer = await take(http, run, { step: 1 }, bytes)
  t.same([answer.updates.first!.replayed, answer.updates.second!.replayed], [true, false])
  t.equal(answer.receipt.digest, (await take(http, whole, { step: 1 }, bytes)).receipt.digest)
  const short = await begin(run, 2, file(3).subarray(0, 3000), 3000)
  short.end()
  const [response] = await once(short, 'response')
  t.equal(response.statusCode, 400, 'a body that ends too early')
  response.resume()
})

t.test('a stream and requests take a run from each other', async (t) => {
  const run = await made()
  const { client } = await stream(run)
  const body = fileOf(tensorsOf(1))
  t.match(await refused(http, run, { step: 1 }, body), { status: 409, code: 'RUN_BUSY', retryable: true })
  t.equal((await take(http, run, { step: 1, query: '&takeover=true' }, body)).receipt.step, 1)
  t.match(await client.closed(), { code: 4409 })
  const waiting = await begin(run, 2, fileOf(tensorsOf(2)).subarray(0, 900), fileOf(tensorsOf(2)).length)
  const responded = once(waiting, 'response')
  await until(() => service.runs.get(run).connected)
  const taken = await RawClient.connect(url)
  taken.send({ type: 'open', protocol: 1, run })
  t.match(await taken.expect('error'), { code: 'RUN_BUSY' })
  taken.send({ type: 'open', protocol: 1, run, takeover: true })
  t.match(await taken.expect('opened'), { step: 1 })
  const [response] = await responded
  const chunks: Buffer[] = await response.toArray()
  t.match(JSON.parse(Buffer.concat(chunks).toString()), { code: 'RUN_BUSY', detail: /another connection has taken/ })
  t.equal((await taken.step(2, gradientsOf(2))).step, 2)
  await taken.close()
  t.equal((await take(http, run, { step: 3 }, fileOf(tensorsOf(3)))).receipt.step, 3)
})

t.test('a run that is deleted ends the request for its step', async (t) => {
  const run = await made()
  const waiting = await begin(run, 1, fileOf(tensorsOf(1)).subarray(0, 900), fileOf(tensorsOf(1)).length)
  await until(() => service.runs.get(run).connected)
  const responded = once(waiting, 'response')
  t.equal((await fetch(`${http}/v1/runs/${run}`, { method: 'DELETE' })).status, 204)
  const [response] = await responded
  t.equal(response.statusCode, 404)
  response.resume()
})

t.test('no memory is left behind', async (t) => {
  await until(() => service.device.staging.used === 0)
  const before = await told(service, 'INTERNAL')
  t.equal(before, 0, 'and none of all this was a bug')
})

t.test('steps survive a restart, and the last one is replayed after it', async (t) => {
  const data = mkdtempSync(join(tmpdir(), 'muond-plain-'))
  const start = () => startService({ data, durability: 'journal', lanes: 1 })
  const first = await start()
  t.equal((await post(first.http, { run: 'r', ...DECLARED })).status, 201)
  const answers = []
  for (const step of [1, 2]) answers.push(await take(first.http, 'r', { step }, fileOf(tensorsOf(step))))
  t.equal(answers[1]!.receipt.durable, true)
  await first.app.close()
  const second = await start()
  t.teardown(() => second.app.close())
  await second.restored
  const again = await take(second.http, 'r', { step: 2 }, fileOf(tensorsOf(2)))
  t.match(again.receipt, { replayed: true, digest: answers[1]!.receipt.digest })
  t.same(again.tensors, answers[1]!.tensors)
  t.equal((await take(second.http, 'r', { step: 3 }, fileOf(tensorsOf(3)))).receipt.step, 3)
})

t.test('a body that drips is refused, and so is one connection too many', async (t) => {
  const limits = { send_timeout_seconds: 0.5, min_bytes_per_second: 2 ** 14, max_connections: 2 }
  const slow = await startService({ lanes: 1, ...limits })
  t.teardown(() => slow.app.close())
  t.equal((await post(slow.http, { run: 'r', ...DECLARED })).status, 201)
  const file = fileOf(tensorsOf(1))
  const headers = { 'content-type': 'application/octet-stream', 'content-length': file.length }
  const dripping = [1, 2].map(() => {
    const outgoing = request(`${slow.http}/v1/runs/r/steps?step=1`, { method: 'POST', agent: false, headers })
    outgoing.on('error', () => {})
    outgoing.write(file.subarray(0, 500))
    return outgoing
  })
  const responses = dripping.map((outgoing) => once(outgoing, 'response'))
  while ((await connectionsOf(slow.http)) < 2) await turn()
  const over = await refused(slow.http, 'r', { step: 1 }, file)
  t.match(over, { status: 429, code: 'OVERLOADED', detail: /2 streams and requests for steps, at most 2/ })
  for (const response of responses) {
    const [answer] = await response
    t.equal(answer.statusCode, 429)
    answer.resume()
  }
  t.equal((await take(slow.http, 'r', { step: 1 }, file)).receipt.step, 1)
})

t.test('tensors in blocks are for the stream, and many missing ones are not all named', async (t) => {
  const one = { name: 'w', shape: [4], group: 'rest' }
  const file = fileOf([{ name: 'w', shape: [4], values: normal(1, 4) }])
  for (const key of ['gradient_dtype', 'update_dtype']) {
    const run = await made({ groups: GROUPS, parameters: [{ ...one, [key]: 'int8_block256' }] })
    const refusal = { status: 422, code: 'DTYPE_UNSUPPORTED', detail: /'w' is int8_block256.*use the stream/ }
    t.match(await refused(http, run, { step: 1 }, file), refusal)
  }
  const parameters = Array.from({ length: 12 }, (_, i) => ({
    ...one,
    name: `w${i}`,
    shape: [4, 2],
    group: 'hidden',
    split: [2, 2],
  }))
  const many = await made({ groups: GROUPS, parameters })
  const detail = /no gradient of 'w0', .*'w9' and 2 more: send it/
  t.match(await refused(http, many, { step: 1 }, fileOf([])), { code: 'STEP_INCOMPLETE', detail })
  t.match(await post(http, { run: many }), { status: 200, body: { parameters: [{ name: 'w0', split: [2, 2] }] } })
})

t.test('a span of the trainer is that of the step, and one that is none is ignored', async (t) => {
  const run = await made()
  const spans: (string | undefined)[] = []
  service.runs.get(run).on('receipt', (_, __, step) => spans.push(step.traceparent))
  const traceparent = `00-${'a'.repeat(32)}-${'b'.repeat(16)}-01`
  for (const [i, header] of [traceparent, 'nonsense'].entries())
    await take(http, run, { step: i + 1, headers: { traceparent: header } }, fileOf(tensorsOf(i + 1)))
  t.same(spans, [traceparent, undefined])
})

t.test('a request that is gone before its turn is over is none', async (t) => {
  const run = await made()
  const body = fileOf(tensorsOf(1))
  const first = await begin(run, 1, body.subarray(0, 900), body.length)
  await until(() => service.runs.get(run).connected)
  const scraped = await service.metrics.registry.metrics()
  t.match(scraped, /^muond_in_flight_bytes \d+$/m)
  const second = await begin(run, 1, body, body.length)
  while ((await connectionsOf(http)) < 2) await turn()
  second.destroy()
  first.destroy()
  await until(() => !service.runs.get(run).connected)
  t.equal((await take(http, run, { step: 1 }, body)).receipt.replayed, false)
})

t.test('who takes a run over ends an answer that is not read', async (t) => {
  const elements = 2 ** 22
  const parameters = [{ name: 'w', shape: [elements], group: 'g' }]
  const run = await made({ groups: [{ name: 'g', algorithm: 'sgd' }], parameters })
  const file = fileOf([{ name: 'w', shape: [elements], values: normal(1, elements) }])
  const outgoing = await begin(run, 1, file, file.length)
  outgoing.end()
  const [response] = await once(outgoing, 'response')
  t.ok(service.runs.get(run).connected, 'the run is its until the answer is read')
  const cut = once(response, 'error')
  const { client } = await stream(run, { takeover: true })
  response.resume()
  t.match(await cut, [{ code: 'ECONNRESET' }])
  await client.close()
  const again = await take(http, run, { step: 1 }, file)
  t.same([again.receipt.replayed, again.tensors.get('update.w')!.data.length], [true, 4 * elements])
})

t.test('a service that shuts down ends the steps that have begun, and begins none', async (t) => {
  const draining = await startService({ lanes: 1, drain_seconds: 60 })
  t.equal((await post(draining.http, { run: 'r', ...DECLARED })).status, 201)
  const file = fileOf(tensorsOf(1))
  const headers = { 'content-type': 'application/octet-stream', 'content-length': file.length }
  const outgoing = request(`${draining.http}/v1/runs/r/steps?step=1`, { method: 'POST', agent: false, headers })
  outgoing.write(file.subarray(0, 900))
  const responded = once(outgoing, 'response')
  await until(() => draining.runs.get('r').connected)
  const drained = draining.drain()
  t.match(await refused(draining.http, 'r', { step: 1 }, file), { status: 503, code: 'DRAINING' })
  outgoing.end(file.subarray(900))
  const [response] = await responded
  t.equal(response.statusCode, 200)
  response.resume()
  await drained
})

t.test('a step keeps to the bytes a second that there may be', async (t) => {
  const slow = await startService({ lanes: 1, max_bytes_per_second: 2 ** 18 })
  t.teardown(() => slow.app.close())
  const parameters = [{ name: 'w', shape: [2 ** 16], group: 'g' }]
  const declared = { groups: [{ name: 'g', algorithm: 'sgd' }], parameters }
  t.equal((await post(slow.http, { run: 'r', ...declared })).status, 201)
  const file = fileOf([{ name: 'w', shape: [2 ** 16], values: normal(1, 2 ** 16) }])
  t.equal((await take(slow.http, 'r', { step: 1 }, file)).receipt.applied, 1)
})
