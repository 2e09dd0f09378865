import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { request } from 'node:http'
import fc from 'fast-check'
import t from 'tap'
import type { components } from '../../src/http/openapi.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import {
  encodeHeader,
  parseSafetensors,
  type SafetensorsDtype,
  type StoredTensor,
} from '../../src/store/safetensors.js'
import { MODEL, train, trainStep } from '../run/trainer.js'
import { bytesOf, normal, RawClient, type Service, startService } from '../service.js'

type Imported = components['schemas']['Imported']
type Answer = { status: number; body: Imported & { code?: string; detail?: string } }

const SMALL = { staging_bytes: 2 ** 20, lanes: 1 }
const urlOf = ({ http }: Service, run: string) => `${http}/v1/runs/${run}/state`

async function exported(service: Service, run: string): Promise<Buffer> {
  const response = await fetch(urlOf(service, run))
  const bytes = Buffer.from(await response.arrayBuffer())
  if (response.status !== 200) throw new Error(`${response.status} ${bytes}`)
  return bytes
}

async function imported(service: Service, run: string, body: Uint8Array, query = ''): Promise<Answer> {
  const response = await fetch(`${urlOf(service, run)}${query}`, {
    method: 'PUT',
    body,
    headers: { 'content-type': 'application/octet-stream' },
  })
  return { status: response.status, body: (await response.json()) as Answer['body'] }
}

type Given = { name: string; dtype: SafetensorsDtype; shape: readonly number[]; data: Uint8Array }

function bodyOf(tensors: readonly Given[], metadata: Record<string, string> = {}): Buffer {
  const entries = tensors.map(({ data, ...tensor }) => ({ ...tensor, bytes: data.length }))
  return Buffer.concat([encodeHeader(entries, metadata), ...tensors.map(({ data }) => data)])
}

/** A safetensors body with changes to its header or its tensors. */
function changed(body: Uint8Array, change: (tensors: Map<string, StoredTensor>) => void): Buffer {
  const { metadata, tensors } = parseSafetensors(body)
  change(tensors)
  return bodyOf(
    [...tensors].map(([name, tensor]) => ({ name, ...tensor })),
    metadata,
  )
}

const int64 = (value: number) => new Uint8Array(BigInt64Array.of(BigInt(value)).buffer)
const float32 = (...values: number[]) => bytesOf(Float32Array.from(values))

t.test('a run goes on from another run’s exported state, bit for bit, with every algorithm', async (t) => {
  const service = await startService(SMALL)
  const { client } = await train(service, { run: 'a', last: 5 })
  const body = await exported(service, 'a')
  const { metadata, tensors } = parseSafetensors(body)
  const digest = service.runs.get('a').digest
  t.match(metadata, { format: 'pt', run: 'a', step: '5', digest })
  t.same(JSON.parse(metadata.momentum_form!), { m: 'ema', qk: 'heavy_ball', experts: 'ema' })
  t.match(JSON.parse(metadata.groups!)[0], { name: 'muon', algorithm: 'muon', hyperparameters: { lr: 0.02 / 5 } })
  t.match(JSON.parse(metadata.parameters!), MODEL.parameters)
  t.equal(tensors.size, 7 + 12, 'a count for each parameter, and its tensors')

  const other = await RawClient.connect(service.url)
  await other.open({ run: 'b', ...MODEL })
  // The run takes steps of its own first, whose state is replaced.
  await trainStep(other, 1, 99)
  const answer = await imported(service, 'b', body)
  t.match(answer, { status: 200, body: { step: 1, parameters: 7, checkpoint: undefined } })
  t.not(answer.body.digest, digest)
  t.match(await (await fetch(`${service.http}/v1/runs/b`)).json(), {
    digest: answer.body.digest,
    note: 'its state was imported after step 1',
  })
  t.same((await exported(service, 'b')).subarray(-1000), body.subarray(-1000))
  for (const [i, step] of [6, 7, 8].entries()) {
    const expected = await trainStep(client, step)
    t.equal((await trainStep(other, 2 + i, step)).updates, expected.updates, `step ${step}`)
  }
  t.same(
    parseSafetensors(await exported(service, 'b')).tensors,
    parseSafetensors(await exported(service, 'a')).tensors,
    'and so does the state',
  )
  await client.close()
  await other.close()
  await service.app.close()
})

t.test('before the first step every count is 0, and that can be imported too', async (t) => {
  const service = await startService(SMALL)
  const { client } = await train(service, { run: 'a', last: 0 })
  const body = await exported(service, 'a')
  t.equal(parseSafetensors(body).tensors.size, 7)
  const first = await trainStep(client, 1)
  t.match(await imported(service, 'a', body), { status: 200, body: { step: 1, parameters: 7 } })
  t.equal(service.runs.get('a').stateBytes, 0)
  t.equal((await trainStep(client, 2, 1)).updates, first.updates)
  await client.close()
  await service.app.close()
})

/** A matrix of each momentum_form, an embedding and a vector; a step of plain numbers. */
const PLAIN = {
  groups: [
    { name: 'ema', algorithm: 'muon', momentum: 0.9 },
    { name: 'ball', algorithm: 'muonclip', momentum: 0.8 },
    { name: 'narrow', algorithm: 'muon', momentum_dtype: 'bfloat16' },
    { name: 'sgd', algorithm: 'sgd', momentum: 0.5 },
  ],
  parameters: [
    { name: 'e', shape: [3, 5], group: 'ema' },
    { name: 'b', shape: [5, 3], group: 'ball' },
    { name: 'n', shape: [4, 4], group: 'narrow' },
    { name: 's', shape: [6], group: 'sgd' },
  ],
}
const SHAPES = new Map(PLAIN.parameters.map(({ name, shape }) => [name, shape]))

async function plainRun(service: Service, run = 'r') {
  const client = await RawClient.connect(service.url)
  await client.open({ run, ...PLAIN })
  return client
}

function plainState(dtype: 'F32' | 'BF16' | 'F16', seed = 1): Given[] {
  return [...SHAPES].flatMap(([name, shape], i) => {
    const count = shape.reduce((a, b) => a * b, 1)
    const values = normal(seed + i, count)
    // 16 bits with a moderate exponent are a finite number in both types.
    const halves = Uint16Array.from(values, (value) => (Math.round(value * 100) & 0x80ff) | 0x3c00)
    return [
      { name: `state.${name}.step`, dtype: 'I64', shape: [], data: int64(3 + i) },
      { name: `state.${name}.momentum_buffer`, dtype, shape, data: bytesOf(dtype === 'F32' ? values : halves) },
    ]
  })
}

/** The numbers of a tensor, by code that shares nothing with the service. */
function numbers({ dtype, data }: Pick<StoredTensor, 'dtype' | 'data'>): number[] {
  const view = new DataView(new Uint8Array(data).buffer)
  if (dtype === 'F32') return Array.from({ length: data.length / 4 }, (_, i) => view.getFloat32(4 * i, true))
  return Array.from({ length: data.length / 2 }, (_, i) => {
    const bits = view.getUint16(2 * i, true)
    const [width, bias] = dtype === 'BF16' ? [7, 127] : [10, 15]
    const exponent = (bits & 0x7fff) >> width
    const fraction = (bits & (2 ** width - 1)) / 2 ** width
    return (
      (bits & 0x8000 ? -1 : 1) * (exponent === 0 ? fraction * 2 ** (1 - bias) : (1 + fraction) * 2 ** (exponent - bias))
    )
  })
}

t.test('momentum is converted in float64 and rounded once, from every type', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  const same = (value: number) => value
  const times = (factor: number) => (value: number) => value * factor
  const over = (divisor: number) => (value: number) => value / divisor
  const allEma = { e: same, b: over(1 - 0.8), n: same, s: same }
  const allBall = { e: times(1 - 0.9), b: same, n: times(1 - 0.95), s: same }
  const stated = { e: times(1 - 0.9), b: over(1 - 0.8), n: same, s: same }
  const asKept = { e: same, b: same, n: same, s: same }
  const CASES = [
    ['?momentum_form=ema', {}, allEma],
    ['?momentum_form=heavy_ball', {}, allBall],
    ['', {}, asKept],
    ['', { momentum_form: 'heavy_ball' }, allBall],
    ['', { momentum_form: '{"e":"heavy_ball","b":"ema"}' }, stated],
    ['?momentum_form=ema', { momentum_form: 'heavy_ball' }, allEma],
  ] as const
  for (const dtype of ['F32', 'BF16', 'F16'] as const) {
    for (const [query, metadata, convert] of CASES) {
      const given = plainState(dtype)
      t.match(await imported(service, 'r', bodyOf(given, metadata), query), { status: 200 })
      const { tensors } = parseSafetensors(await exported(service, 'r'))
      for (const [i, name] of (['e', 'b', 'n', 's'] as const).entries()) {
        const kept = tensors.get(`state.${name}.momentum_buffer`)!
        const exact = numbers(given[2 * i + 1]!).map(convert[name])
        const what = `${dtype} ${query} ${name}`
        if (name === 'n') {
          t.equal(kept.dtype, 'BF16')
          const errors = numbers(kept).map((value, j) => Math.abs(value / exact[j]! - 1))
          t.ok(Math.max(...errors) <= 2 ** -8, `${what}: ${Math.max(...errors)}`)
        } else t.same(numbers(kept), exact.map(Math.fround), what)
        t.same(tensors.get(`state.${name}.step`)!.data, Buffer.from(int64(3 + i)))
      }
    }
  }
  await client.close()
  await service.app.close()
})

t.test('counts may be float32, as torch keeps them', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  const given = plainState('F32').map((tensor) =>
    tensor.dtype === 'I64' ? { ...tensor, dtype: 'F32' as const, data: float32(7) } : tensor,
  )
  t.match(await imported(service, 'r', bodyOf(given)), { status: 200 })
  t.equal(service.runs.get('r').place(2).count, 7)
  await client.close()
  await service.app.close()
})

t.test('what a body lacks stays as it is with partial, and is refused without', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  const whole = plainState('F32')
  t.match(await imported(service, 'r', bodyOf(whole.slice(2))), {
    status: 422,
    body: { code: 'STATE_INVALID', detail: `the body has no state of 'e' of run 'r'; with partial they keep theirs` },
  })
  t.equal(service.runs.get('r').stateBytes, 0)
  const many = await RawClient.connect(service.url)
  const parameters = Array.from({ length: 12 }, (_, i) => ({ name: `p${i}`, shape: [1], group: 'g' }))
  await many.open({ run: 'many', groups: [{ name: 'g', algorithm: 'sgd' }], parameters })
  t.match(await imported(service, 'many', encodeHeader([])), {
    body: { detail: /'p8', 'p9' and 2 more of run 'many'/ },
  })
  await many.close()
  const part = await imported(service, 'r', bodyOf(whole.slice(0, 2)), '?partial=true')
  t.match(part, { status: 200, body: { parameters: 1 } })
  t.equal(service.runs.get('r').stateBytes, 15 * 4)
  const rest = await imported(service, 'r', bodyOf(whole.slice(2)), '?partial=true')
  t.match(rest, { status: 200, body: { parameters: 3 } })
  // Imported in two parts or as one, the state is the same, and so is the digest.
  t.equal((await imported(service, 'r', bodyOf(whole))).body.digest, rest.body.digest)
  await client.close()
  await service.app.close()
})

t.test('the digest of an import is what docs/protocol.md says', async (t) => {
  const service = await startService(SMALL)
  const client = await RawClient.connect(service.url)
  await client.open({
    run: 'demo',
    groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
    parameters: [{ name: 'w', shape: [2, 2], group: 'all' }],
  })
  const data = float32(1, 2, 3, 4)
  const body = bodyOf([
    { name: 'state.w.momentum_buffer', dtype: 'F32', shape: [2, 2], data },
    { name: 'state.w.step', dtype: 'I64', shape: [], data: int64(7) },
  ])
  const { body: answer } = await imported(service, 'demo', body)
  const tensor = createHash('sha256').update(data).digest()
  const expected = createHash('sha256')
    .update('muond import')
    .update(Buffer.from(FIRST_DIGEST, 'hex'))
    .update(tensor)
    .update(int64(7))
    .digest('hex')
  t.equal(answer.digest, expected)
  const text = readFileSync('docs/protocol.md', 'utf8')
  t.match(text, `= ${tensor.toString('hex')}\n    d' = ${expected}\n`)
  t.equal(answer.digest, '54d8ddd9a0c703f844f7253181b0d82bf9a196361d34a7fefa95fcd990ccc8bf')
  await client.close()
  await service.app.close()
})

/** Bodies that are refused, and why; nothing of them is kept. */
const REFUSED: [string, Uint8Array, { status: number; code: string; detail: RegExp }][] = (() => {
  const body = bodyOf(plainState('F32'))
  const put = (name: string, tensor: Partial<StoredTensor>) =>
    changed(body, (tensors) => tensors.set(name, { ...tensors.get(name)!, ...tensor }))
  const buffer = 'state.e.momentum_buffer'
  const value = (at: number, number: number) => {
    const values = normal(1, 15)
    values[at] = number
    return put(buffer, { data: bytesOf(values) })
  }
  const lie = (length: bigint) => {
    const copy = Buffer.from(body)
    copy.writeBigUInt64LE(length)
    return copy
  }
  const text = (from: string, to: string) => Buffer.from(body.toString('latin1').replace(from, to), 'latin1')
  return [
    [
      'nothing',
      Buffer.alloc(0),
      { status: 400, code: 'REQUEST_INVALID', detail: /ends after 0 bytes, within its header/ },
    ],
    ['half a length', body.subarray(0, 5), { status: 400, code: 'REQUEST_INVALID', detail: /ends after 5 bytes/ }],
    [
      'half a header',
      body.subarray(0, 300),
      { status: 400, code: 'REQUEST_INVALID', detail: /header claims \d+ bytes, at most 292 are/ },
    ],
    ['a body cut off', body.subarray(0, -1), { status: 400, code: 'REQUEST_INVALID', detail: /tensors end at byte/ }],
    [
      'a body too long',
      Buffer.concat([body, Buffer.alloc(1)]),
      { status: 400, code: 'REQUEST_INVALID', detail: /tensors end at byte/ },
    ],
    [
      'a header of 2^64 - 1 bytes',
      lie(2n ** 64n - 1n),
      { status: 400, code: 'REQUEST_INVALID', detail: /header claims 18446744073709552000 bytes/ },
    ],
    ['a header that is short', lie(100n), { status: 400, code: 'REQUEST_INVALID', detail: /header is not JSON/ }],
    [
      'an unknown dtype',
      text('"dtype":"F32"', '"dtype":"F64"'),
      { status: 400, code: 'REQUEST_INVALID', detail: /has dtype "F64", expected one of F32/ },
    ],
    [
      'a tensor of integers',
      put(buffer, { dtype: 'I64', data: new Uint8Array(120) }),
      {
        status: 422,
        code: 'DTYPE_UNSUPPORTED',
        detail: /'state.e.momentum_buffer' is I64, expected one of F32, BF16, F16$/,
      },
    ],
    [
      'a count in 16 bits',
      put('state.e.step', { dtype: 'F16', data: new Uint8Array(2) }),
      { status: 422, code: 'DTYPE_UNSUPPORTED', detail: /'state.e.step' is F16, expected one of I64, F32$/ },
    ],
    [
      'another shape',
      put(buffer, { shape: [5, 3] }),
      { status: 422, code: 'SHAPE_MISMATCH', detail: /has shape \[5,3\], expected \[3,5\]$/ },
    ],
    [
      'a list of counts',
      put('state.e.step', { shape: [1] }),
      { status: 422, code: 'SHAPE_MISMATCH', detail: /has shape \[1\], expected \[\]$/ },
    ],
    [
      'an unknown name',
      changed(body, (tensors) => tensors.set('state.e.exp_avg', tensors.get(buffer)!)),
      {
        status: 422,
        code: 'STATE_INVALID',
        detail: /^the body has tensor 'state.e.exp_avg', run 'r' has none of that name$/,
      },
    ],
    [
      'no count',
      changed(body, (tensors) => tensors.delete('state.e.step')),
      {
        status: 422,
        code: 'STATE_INVALID',
        detail: /^the body has tensor 'state.e.momentum_buffer' but no tensor 'state.e.step'$/,
      },
    ],
    [
      'a count without its tensor',
      changed(body, (tensors) => tensors.delete(buffer)),
      { status: 422, code: 'STATE_INVALID', detail: /^tensor 'state.e.step' is 3, expected 0, as/ },
    ],
    [
      'a tensor with count 0',
      put('state.e.step', { data: int64(0) }),
      { status: 422, code: 'STATE_INVALID', detail: /'state.e.step' is 0, expected an integer from 1 on$/ },
    ],
    [
      'a negative count',
      put('state.e.step', { data: int64(-1) }),
      { status: 422, code: 'STATE_INVALID', detail: /is -1, expected/ },
    ],
    [
      'half a count',
      put('state.e.step', { dtype: 'F32', data: float32(1.5) }),
      { status: 422, code: 'STATE_INVALID', detail: /is 1.5, expected/ },
    ],
    [
      'a count beyond 2^53',
      put('state.e.step', { data: new Uint8Array(BigInt64Array.of(2n ** 60n).buffer) }),
      { status: 422, code: 'STATE_INVALID', detail: /expected an integer/ },
    ],
    [
      'a NaN',
      value(7, NaN),
      {
        status: 422,
        code: 'STATE_INVALID',
        detail: /^tensor 'state.e.momentum_buffer' has NaN as element 7, expected a finite number$/,
      },
    ],
    [
      'an infinity',
      value(14, -Infinity),
      { status: 422, code: 'STATE_INVALID', detail: /has -Infinity as element 14/ },
    ],
    [
      'a form that is none',
      bodyOf(plainState('F32'), { momentum_form: '{"e":"nesterov"}' }),
      {
        status: 422,
        code: 'STATE_INVALID',
        detail: /momentum_form is '{"e":"nesterov"}', expected ema, heavy_ball or a map/,
      },
    ],
    [
      'a form that is no JSON',
      bodyOf(plainState('F32'), { momentum_form: '{' }),
      { status: 422, code: 'STATE_INVALID', detail: /momentum_form is '{'/ },
    ],
    [
      'a form that is null',
      bodyOf(plainState('F32'), { momentum_form: 'null' }),
      { status: 422, code: 'STATE_INVALID', detail: /momentum_form is 'null'/ },
    ],
    [
      'far more than the state',
      Buffer.alloc(2 ** 20),
      {
        status: 413,
        code: 'REQUEST_INVALID',
        detail: /^the body has 1048576 bytes, one with the state of run 'r' has at most \d+$/,
      },
    ],
  ]
})()

t.test('a body that does not fit is refused, and the run stays as it was', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  t.match(await imported(service, 'r', bodyOf(plainState('F32', 9))), { status: 200 })
  const before = await exported(service, 'r')
  const { bytes } = service.device.memory
  const granted = service.device.admittedBytes
  for (const [name, body, error] of REFUSED) {
    const { status, code, detail } = error
    t.match(await imported(service, 'r', body), { status, body: { code, detail } }, name)
    t.equal(service.device.memory.bytes, bytes, name)
    t.equal(service.device.admittedBytes, granted, name)
  }
  t.match(await imported(service, 'nobody', before), { status: 404, body: { code: 'RUN_NOT_FOUND' } })
  t.match(await imported(service, 'r', before, '?momentum_form=adam'), {
    status: 400,
    body: { code: 'REQUEST_INVALID' },
  })
  t.match(await imported(service, 'r', before, '?part=true'), { status: 400, body: { code: 'REQUEST_INVALID' } })
  t.same(await exported(service, 'r'), before)
  await client.close()
  await service.app.close()
})

t.test('averages of squares are not negative, and a conversion may not overflow', async (t) => {
  const service = await startService(SMALL)
  const client = await RawClient.connect(service.url)
  await client.open({
    run: 'r',
    groups: [
      { name: 'a', algorithm: 'adamw' },
      { name: 'm', algorithm: 'muonclip', momentum: 0.99, momentum_dtype: 'bfloat16' },
    ],
    parameters: [
      { name: 'a', shape: [2], group: 'a' },
      { name: 'm', shape: [1, 2], group: 'm' },
    ],
  })
  const body = (square: number, momentum: number) =>
    bodyOf([
      { name: 'state.a.exp_avg', dtype: 'F32', shape: [2], data: float32(-1, -0) },
      { name: 'state.a.exp_avg_sq', dtype: 'F32', shape: [2], data: float32(-0, square) },
      { name: 'state.a.step', dtype: 'I64', shape: [], data: int64(1) },
      { name: 'state.m.momentum_buffer', dtype: 'F32', shape: [1, 2], data: float32(1, momentum) },
      { name: 'state.m.step', dtype: 'I64', shape: [], data: int64(1) },
    ])
  t.match(await imported(service, 'r', body(-1e-9, 1)), {
    status: 422,
    body: { detail: /^tensor 'state.a.exp_avg_sq' has -9.99\d*e-10 as element 1, expected a finite number >= 0$/ },
  })
  const overflow = { status: 422, body: { detail: /^tensor 'state.m.momentum_buffer' has Infinity as element 1/ } }
  t.match(await imported(service, 'r', body(1, 1e38), '?momentum_form=ema'), overflow)
  t.match(await imported(service, 'r', body(1, 3.4028234e38)), overflow, 'beyond what bfloat16 can round to')
  t.match(await imported(service, 'r', body(0, 1e38)), { status: 200 })
  await client.close()
  await service.app.close()
})

t.test('no bytes make an import fail in a way that is not told', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  const body = bodyOf(plainState('F32'))
  const header = Number(body.readBigUInt64LE()) + 8
  await fc.assert(
    fc.asyncProperty(fc.nat(header - 1), fc.integer({ min: 1, max: 255 }), async (at, change) => {
      const damaged = Buffer.from(body)
      damaged[at]! ^= change
      const { status } = await imported(service, 'r', damaged)
      t.ok([200, 400, 422].includes(status), `byte ${at} changed by ${change}: ${status}`)
    }),
    { numRuns: 150, seed: 12 },
  )
  t.equal(service.device.admittedBytes, service.runs.get('r').grant.bytes[0])
  await client.close()
  await service.app.close()
})

/** A request whose body the test writes piece by piece. */
function upload(service: Service, run: string, headers: Record<string, string | number> = {}) {
  const outgoing = request(urlOf(service, run), {
    method: 'PUT',
    headers: { 'content-type': 'application/octet-stream', ...headers },
  })
  outgoing.on('error', () => {})
  const answer = once(outgoing, 'response').then(async ([response]) => {
    const text = Buffer.concat(await response.toArray()).toString()
    return { status: response.statusCode as number, body: JSON.parse(text) as Answer['body'] }
  })
  answer.catch(() => {})
  return { outgoing, answer }
}

t.test('a body may come in chunks of any size and without its length', async (t) => {
  const service = await startService(SMALL)
  const client = await plainRun(service)
  const body = bodyOf(plainState('BF16'))
  const whole = await imported(service, 'r', body)
  for (const size of [1, 7, 100]) {
    const { outgoing, answer } = upload(service, 'r')
    for (let at = 0; at < body.length; at += size) {
      if (!outgoing.write(body.subarray(at, at + size))) await once(outgoing, 'drain')
    }
    outgoing.end()
    t.match(await answer, { status: 200, body: { digest: whole.body.digest } }, `${size} bytes at a time`)
  }
  const short = upload(service, 'r')
  short.outgoing.write(body.subarray(0, -3))
  short.outgoing.end()
  t.match(await short.answer, {
    status: 400,
    body: { detail: /^the body ends after \d+ bytes, its last tensor ends at \d+$/ },
  })
  const long = upload(service, 'r')
  long.outgoing.write(Buffer.concat([body, Buffer.from('x')]))
  t.match(await long.answer, {
    status: 400,
    body: { detail: /^the body has \d+ bytes or more, its last tensor ends at \d+$/ },
  })
  long.outgoing.destroy()
  t.equal(service.runs.get('r').digest, whole.body.digest)
  await client.close()
  await service.app.close()
})

t.test('one import at a time; one that stalls or is left gives everything back', async (t) => {
  const service = await startService({ ...SMALL, send_timeout_seconds: 2 })
  const client = await plainRun(service)
  const body = bodyOf(plainState('F32'))
  const granted = service.device.admittedBytes
  const holds = async (bytes: number) => {
    while (service.device.admittedBytes !== bytes) await new Promise(setImmediate)
  }
  const first = upload(service, 'r', { 'content-length': body.length })
  first.outgoing.write(body.subarray(0, -10))
  await holds(granted + 4 * (15 + 15 + 6) + 2 * 16)
  t.match(await imported(service, 'r', body), { status: 409, body: { code: 'RUN_BUSY', retryable: true } })
  first.outgoing.end(body.subarray(-10))
  t.match(await first.answer, { status: 200 })
  await holds(granted)

  const left = upload(service, 'r', { 'content-length': body.length })
  left.outgoing.write(body.subarray(0, -10))
  await holds(granted + 176)
  left.outgoing.destroy()
  await holds(granted)

  const stalled = upload(service, 'r', { 'content-length': body.length })
  stalled.outgoing.write(body.subarray(0, -10))
  await holds(granted + 176)
  await holds(granted)
  t.match(await imported(service, 'r', body), { status: 200 }, 'and the run is free again')
  t.equal(service.device.memory.bytes, 176)
  await client.close()
  await service.app.close()
})

t.test('an import that there is no memory for is refused with both numbers', async (t) => {
  const service = await startService({ ...SMALL, state_bytes_limit: 4216 })
  const client = await RawClient.connect(service.url)
  await client.open({
    run: 'r',
    groups: [{ name: 'g', algorithm: 'sgd' }],
    parameters: [{ name: 'w', shape: [300], group: 'g' }],
  })
  const body = bodyOf([
    { name: 'state.w.momentum_buffer', dtype: 'F32', shape: [300], data: new Uint8Array(1200) },
    { name: 'state.w.step', dtype: 'I64', shape: [], data: int64(1) },
  ])
  t.match(await imported(service, 'r', body), {
    status: 507,
    body: {
      code: 'OVER_CAPACITY',
      detail: /^the state imported into run 'r' needs 1200 bytes of memory on cpu, 600 are left: /,
    },
  })
  await client.close()
  await service.app.close()
})

t.test('an import waits for the end of a step, and the step after it waits for the import', async (t) => {
  const service = await startService(SMALL)
  const { client } = await train(service, { last: 3 })
  const body = await exported(service, 'r')
  const run = service.runs.get('r')
  client.gradient(0, 4, { values: normal(1, 24 * 16) })
  while (run.ahead.length === 0) await new Promise(setImmediate)
  const listening = run.listenerCount('receipt')
  const importing = imported(service, 'r', body)
  const reading = exported(service, 'r')
  while (run.listenerCount('receipt') < listening + 2) await new Promise(setImmediate)
  client.send({ type: 'end', step: 4, skipped: [1, 2, 3, 4, 5, 6] })
  const { digest } = await client.expect('receipt')
  t.equal(parseSafetensors(await reading).metadata.step, '4')
  const answer = await importing
  t.match(answer, { status: 200, body: { step: 4 } })
  t.not(answer.body.digest, digest)
  t.same(parseSafetensors(await exported(service, 'r')).tensors, parseSafetensors(body).tensors)
  // The step before the import still has its receipt, but its updates cannot be computed again.
  client.gradient(0, 4, { values: normal(1, 24 * 16) })
  t.match(await client.expect('error'), {
    code: 'STEP_CONFLICT',
    expected_step: 5,
    message: `a gradient of 'm' for step 4: run 'r' has finished step 4, and its state was imported since, expected is step 5`,
  })
  client.send({ type: 'end', step: 4 })
  t.match(await client.expect('receipt'), { step: 4, replayed: true, digest })
  t.match(await trainStep(client, 5), { step: 5 })
  await client.close()
  await service.app.close()
})

t.test('imports come between the steps of a client that never waits', async (t) => {
  const service = await startService(SMALL)
  const { client } = await train(service, { last: 3 })
  const body = await exported(service, 'r')
  const stepping = (async () => {
    for (let step = 4; step <= 40; step++) await trainStep(client, step)
  })()
  const digests = new Set<string>()
  while (service.runs.get('r').step < 30) {
    const answer = await imported(service, 'r', body)
    t.equal(answer.status, 200)
    digests.add(answer.body.digest)
  }
  await stepping
  t.ok(digests.size > 1, `${digests.size} imports`)
  t.equal(service.runs.get('r').receipts(0).length, 40)
  await client.close()
  await service.app.close()
})

t.test('a reader keeps the state of its moment, and gives it back when it leaves', async (t) => {
  const service = await startService({ lanes: 1 })
  const client = await RawClient.connect(service.url)
  const elements = 2 ** 22
  await client.open({
    run: 'r',
    groups: [{ name: 'g', algorithm: 'sgd' }],
    parameters: [{ name: 'w', shape: [elements], group: 'g' }],
  })
  const body = bodyOf([
    { name: 'state.w.step', dtype: 'I64', shape: [], data: int64(1) },
    { name: 'state.w.momentum_buffer', dtype: 'F32', shape: [elements], data: new Uint8Array(4 * elements) },
  ])
  t.match(await imported(service, 'r', body), { status: 200 })
  const reading = request(urlOf(service, 'r')).end()
  const [response] = await once(reading, 'response')
  t.equal(Number(response.headers['content-length']), (await exported(service, 'r')).length)
  t.equal((await fetch(`${service.http}/v1/runs/r`, { method: 'DELETE' })).status, 204)
  t.equal(service.device.memory.bytes, 4 * elements, 'the reader has it still')
  response.destroy()
  while (service.device.memory.bytes > 0) await new Promise(setImmediate)
  await service.app.close()
})

t.test('another media type, and a stream where none is taken, are refused', async (t) => {
  const service = await startService(SMALL)
  const put = (path: string, method: string, type?: string) =>
    fetch(`${service.http}${path}`, {
      method,
      ...(type && { headers: { 'content-type': type } }),
      body: new Uint8Array(9),
    })
  t.equal((await put('/v1/runs/r/state', 'PUT', 'application/x-tar')).status, 415)
  t.equal((await put('/v1/runs/r/checkpoints', 'POST', 'application/octet-stream')).status, 415)
  const { client } = await train(service, { run: 'r', last: 1 })
  const nothing = await fetch(`${service.http}/v1/runs/r/state`, { method: 'PUT' })
  await client.close()
  t.match([nothing.status, await nothing.json()], [400, { code: 'REQUEST_INVALID', detail: /no body/ }])
  await service.app.close()
})
