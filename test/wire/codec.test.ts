import fc from 'fast-check'
import t from 'tap'
import { ServiceError } from '../../src/errors.js'
import {
  decodeClientFrame,
  decodeServerFrame,
  encodeFrame,
  encodeHeader,
  encodeWithData,
  peekGradient,
} from '../../src/wire/codec.js'
import type { ClientFrame, GradientFrame, ServerFrame } from '../../src/wire/frame.js'
import { SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import { type Cursor, cursorOf, nextToken, takeBytes } from '../../src/wire/msgpack.js'
import type { Schema } from '../../src/wire/schema.js'
import { known } from '../service.js'
import {
  array,
  bin,
  FLOAT_ONE,
  gradient,
  hex,
  nested,
  opening,
  parameter,
  raw,
  step,
  str,
  TRUE,
  uint32,
} from './bytes.js'

const LIMITS = { chunk_bytes: 4096 }
const seed = 20261123

type Other = Exclude<ClientFrame, GradientFrame>

const name = fc.string({ maxLength: 40, unit: 'grapheme' })
const count = fc.oneof(fc.nat(300), fc.maxSafeNat())
const number = fc.oneof(fc.double({ noNaN: true }), fc.integer(), fc.maxSafeInteger()).map((x) => (x === 0 ? 0 : x))
const hyperparameter = fc.oneof(
  number,
  fc.boolean(),
  name,
  fc.array(fc.array(number, { maxLength: 3 }), { maxLength: 4 }),
)
const hyperparameters = fc.dictionary(
  name.filter((key) => key !== 'ns_steps'),
  hyperparameter,
  { maxKeys: 5 },
)
const maybe = <T>(arbitrary: fc.Arbitrary<T>) => fc.option(arbitrary, { nil: undefined })

const rows = fc.record({ parameter: count, first_row: maybe(fc.integer()) })
const attention = fc.record({
  ...{ name, query_heads: fc.integer(), query: rows, key: rows, threshold: maybe(number), rule: maybe(name) },
  ...{ key_value_heads: maybe(fc.integer()), head_dim: maybe(fc.integer()), nope_dim: maybe(fc.integer()) },
  ...{ rope_dim: maybe(fc.integer()), value_dim: maybe(fc.integer()), query_bias: maybe(rows), key_bias: maybe(rows) },
})

const open = fc.record({
  type: fc.constant('open' as const),
  protocol: fc.constant(1),
  run: fc.stringMatching(/^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/),
  mode: maybe(fc.constantFrom('create' as const, 'resume' as const, 'create_or_resume' as const)),
  groups: maybe(
    fc.array(
      fc.tuple(name, name, hyperparameters).map(([first, algorithm, rest]) => ({ ...rest, name: first, algorithm })),
      { maxLength: 3 },
    ),
  ),
  parameters: maybe(
    fc.array(
      fc.record({
        name,
        shape: fc.array(fc.integer(), { maxLength: 4 }),
        group: name,
        gradient_dtype: maybe(name),
        update_dtype: maybe(name),
        split: maybe(fc.array(fc.nat())),
        heads: maybe(fc.integer()),
        matrices: maybe(name),
      }),
      { maxLength: 4 },
    ),
  ),
  attentions: maybe(fc.array(attention, { maxLength: 3 })),
  takeover: maybe(fc.boolean()),
  checkpoint: maybe(name),
  client: maybe(name),
})

const other: fc.Arbitrary<Other> = fc.oneof(
  open,
  fc.record({
    type: fc.constant('step' as const),
    step: count,
    groups: maybe(fc.dictionary(name, hyperparameters, { maxKeys: 3 })),
    gradient_scale: maybe(number),
    max_logits: maybe(fc.dictionary(name, fc.array(number), { maxKeys: 3 })),
  }),
  fc.record({ type: fc.constant('end' as const), step: count, skipped: maybe(fc.array(count)) }),
  fc.record({ type: fc.constant('checkpoint' as const), tag: maybe(name) }),
)

const header = fc.record({ type: fc.constant('gradient' as const), parameter: count, step: count, offset: count })
const payload = fc.oneof(fc.uint8Array({ maxLength: 400 }), fc.constant(new Uint8Array(4096).fill(7)))

/** The frame that arrives: undefined keys are gone. */
const arrived = (frame: object) => JSON.parse(JSON.stringify(frame))

t.test('every frame of a client arrives as it was sent', async (t) => {
  fc.assert(
    fc.property(other, (frame) => {
      t.same(arrived(decodeClientFrame(encodeFrame(frame), LIMITS)), arrived(frame))
    }),
    { seed, numRuns: 200 },
  )
})

t.test('a gradient arrives with its bytes as a view of the message, and the peek at its head agrees', async (t) => {
  fc.assert(
    fc.property(header, payload, (head, data) => {
      const message = encodeWithData(head, data)
      const frame = decodeClientFrame(message, LIMITS) as GradientFrame
      t.equal(frame.data.buffer, message.buffer)
      t.ok(Buffer.from(data).equals(frame.data))
      const peek = peekGradient(message)
      t.same(peek, {
        parameter: frame.parameter,
        step: frame.step,
        offset: frame.offset,
        dataStart: message.length - data.length,
        dataLength: data.length,
      })
      t.same(peekGradient(encodeHeader(head, data.length)), peek)
    }),
    { seed, numRuns: 100 },
  )
})

t.test('a header and its payload as two fragments are the message in one piece', async (t) => {
  for (const length of [0, 255, 256, 65535, 65536]) {
    const head = { type: 'update' as const, parameter: 1, step: 2, offset: 0, scale: -0.5 }
    const data = new Uint8Array(length).fill(3)
    const whole = Buffer.concat([encodeHeader(head, length), data])
    t.same(whole, encodeWithData(head, data))
    const frame = known(decodeServerFrame(whole))
    t.equal(frame.type === 'update' && frame.data?.length, length)
  }
})

t.test('data may stand anywhere among the keys', async (t) => {
  const bytes = raw(['data', bin(4)], ['step', 1], ['type', 'gradient'], ['offset', 0], ['parameter', 0])
  t.same(decodeClientFrame(bytes, LIMITS), {
    type: 'gradient',
    parameter: 0,
    step: 1,
    offset: 0,
    data: Buffer.alloc(4),
  })
  t.equal(peekGradient(bytes), undefined)
})

t.test('every width of an integer is read as the same number', async (t) => {
  const cases: [string, number][] = [
    ['07', 7],
    ['cc07', 7],
    ['cd0007', 7],
    ['ce00000007', 7],
    ['cf0000000000000007', 7],
    ['d007', 7],
    ['d10007', 7],
    ['d200000007', 7],
    ['d30000000000000007', 7],
    ['cf001fffffffffffff', Number.MAX_SAFE_INTEGER],
  ]
  for (const [text, step] of cases) {
    t.match(decodeClientFrame(raw(['type', 'end'], ['step', hex(text)]), LIMITS), { step })
  }
})

t.test('an integer stands for a float, in half the floats too', async (t) => {
  for (const [text, scale] of [
    ['02', 2],
    ['fe', -2],
    ['ca3f000000', 0.5],
    ['cb7ff8000000000000', Number.NaN],
  ] as const) {
    const frame = decodeClientFrame(raw(['type', 'step'], ['step', 1], ['gradient_scale', hex(text)]), LIMITS)
    t.equal(frame.type === 'step' && Object.is(frame.gradient_scale, scale), true)
  }
})

t.test('a key named like a property of every object is a key like any other', async (t) => {
  const groups = JSON.parse('{"__proto__": {"lr": 1}, "constructor": {"hasOwnProperty": 2}}')
  const frame = decodeClientFrame(encodeFrame({ type: 'step', step: 1, groups }), LIMITS)
  if (frame.type !== 'step') throw new Error('expected a step')
  t.same(Object.keys(frame.groups ?? {}), ['__proto__', 'constructor'])
  t.same(Object.getOwnPropertyDescriptor(frame.groups, '__proto__')?.value, { lr: 1 })
  t.equal(Object.getPrototypeOf(frame.groups), Object.prototype)
})

t.test('what the layout or the optimizer must judge passes', async (t) => {
  const odd = parameter(['heads', -1], ['split', array(-2, 0)], ['matrices', 'sideways'])
  t.match(decodeClientFrame(odd, LIMITS), { parameters: [{ heads: -1, split: [-2, 0], matrices: 'sideways' }] })
  const values = raw(
    ['name', 'g'],
    ['algorithm', 'nope'],
    ['lr', 'much'],
    ['x', array(bin(1), TRUE, raw(['y', FLOAT_ONE]))],
  )
  t.match(decodeClientFrame(opening(['groups', array(values)]), LIMITS), {
    groups: [{ algorithm: 'nope', lr: 'much', x: [Buffer.alloc(1), true, { y: 1 }] }],
  })
  const deep = step('groups', raw(['g', raw(['x', nested(5)])]))
  t.match(decodeClientFrame(deep, LIMITS), { groups: { g: { x: [[[[[1]]]]] } } })
})

t.test('a peek wants more until the head is whole, and gives up where it never will be', async (t) => {
  const message = encodeWithData(
    { type: 'gradient', parameter: 70_000, step: 2 ** 40, offset: 2 ** 33 },
    new Uint8Array(9),
  )
  const start = message.length - 9
  for (let length = 0; length < start; length++) t.equal(peekGradient(message.subarray(0, length)), 'more')
  t.same(peekGradient(message.subarray(0, start)), {
    parameter: 70_000,
    step: 2 ** 40,
    offset: 2 ** 33,
    dataStart: start,
    dataLength: 9,
  })
  const longKey = Buffer.concat([hex('85 dbffffffff'), Buffer.alloc(2000, 0x61)])
  const never: [string, Uint8Array][] = [
    ['a list', hex('95')],
    ['four keys', raw(['type', 'gradient'], ['step', 1], ['offset', 0], ['parameter', 0])],
    ['another type', raw(['type', 'update'], ['parameter', 0], ['step', 1], ['offset', 0], ['data', bin(1)])],
    ['a float', gradient('step', FLOAT_ONE)],
    ['a negative number', gradient('step', -1)],
    ['text as data', gradient('data', 'abcd')],
    ['a key twice', raw(['type', 'gradient'], ['step', 1], ['step', 1], ['parameter', 0], ['data', bin(1)])],
    ['another last key', raw(['type', 'gradient'], ['parameter', 0], ['step', 1], ['offset', 0], ['bytes', bin(1)])],
    ['an unknown key', raw(['type', 'gradient'], ['__proto__', 0], ['step', 1], ['offset', 0], ['data', bin(1)])],
    ['an extension', hex('85 d4')],
    ['a key that fills the head', longKey],
  ]
  for (const [what, bytes] of never) t.equal(peekGradient(bytes), undefined, what)
  t.equal(peekGradient(longKey.subarray(0, 1000)), 'more')
})

const server: ServerFrame[] = [
  {
    type: 'opened',
    run: 'r',
    epoch: 1,
    step: 0,
    resumed: false,
    digest: 'ab',
    ahead: [0],
    parameters: [
      {
        index: 0,
        name: 'w',
        shape: [2, 2],
        group: 'g',
        gradient_dtype: 'float32',
        update_dtype: 'float32',
        step: 0,
        algorithm: 'sgd',
        heads: 2,
      },
    ],
    attentions: [
      {
        name: 'a',
        threshold: 100,
        rule: 'mla',
        query_heads: 4,
        key_value_heads: 4,
        nope_dim: 8,
        rope_dim: 4,
        value_dim: 8,
        query: { parameter: 0, first_row: 0 },
        key: { parameter: 1, first_row: 96 },
        key_bias: { parameter: 2, first_row: 0 },
      },
    ],
    groups: { g: { lr: 0.1, nesterov: false } },
    limits: { chunk_bytes: 4096, other: 1 },
    server: { name: 'muond', version: '0.1.0', device: 'cpu', threads: 2 },
  },
  {
    type: 'update',
    parameter: 0,
    step: 1,
    offset: 0,
    scale: -1,
    decay: 0,
    row_scale: Buffer.alloc(8),
    replayed: false,
    gradient_norm: 1,
    update_rms: 1,
  },
  {
    ...{ type: 'updates', step: 1, replayed: true, parameters: [3, 70_000], scale: [-1, 2], decay: [0, 0.5] },
    ...{ gradient_norm: [1, 2.5], update_rms: [0, 1], row_scale: { '70000': Buffer.alloc(8) } },
  },
  {
    type: 'receipt',
    step: 1,
    replayed: false,
    applied: 1,
    skipped: 0,
    gradient_norm: 1.5,
    groups: { g: { lr: 0.1 } },
    clipped_heads: { a: 2 },
    max_logit: 250.5,
    digest: 'cd',
    durable: false,
    seconds: { receive: 0.1, queue: 0, compute: 0.2, send: 0.1 },
  },
  { type: 'checkpointed', checkpoint: 'c', step: 1, digest: 'cd', bytes: 2 ** 40 },
  { type: 'error', code: 'STEP_CONFLICT', message: 'm', status: 409, retryable: false, step: 3, expected_step: 2 },
  { type: 'draining', deadline_seconds: 30 },
]

for (const frame of server) {
  t.test(`${frame.type} reaches the client as it was sent`, async (t) => {
    t.same(decodeServerFrame(encodeFrame(frame)), frame)
  })
}

/** Where each number of a message lies that its schema calls a float, with its first byte; `groups` hold hyperparameters. */
function floatBytes(cursor: Cursor, schema: Schema, path: string): [string, number][] {
  const [at, { kind, value }] = [cursor.position, nextToken(cursor)]
  const isCount = path.endsWith('.ns_steps')
  if (kind === 'int' || kind === 'float')
    return schema.is === 'float' || (schema.is === 'hyperparameter' && !isCount) ? [[path, cursor.bytes[at]!]] : []
  if (kind === 'string' || kind === 'bin') takeBytes(cursor, value)
  const of = schema.is === 'list' || schema.is === 'dictionary' ? schema.of : schema
  if (kind === 'list') return Array.from({ length: value }, (_, i) => floatBytes(cursor, of, `${path}[${i}]`)).flat()
  if (kind !== 'map') return []
  return Array.from({ length: value }, () => {
    const key = String(takeBytes(cursor, nextToken(cursor).value))
    const keys = schema.is === 'map' ? { ...schema.required, ...schema.optional } : {}
    const inner = schema.is === 'map' ? (keys[key] ?? schema.rest ?? { is: 'any' as const }) : of
    return floatBytes(cursor, inner, `${path}.${key}`)
  }).flat()
}

/** A frame in which each float is `x`. */
function withFloats(frame: ServerFrame, groups: Record<string, Record<string, unknown>>, x: number): ServerFrame {
  switch (frame.type) {
    case 'opened':
      return { ...frame, groups, attentions: frame.attentions.map((one) => ({ ...one, threshold: x })) }
    case 'update':
      return { ...frame, scale: x, decay: x, gradient_norm: x, update_rms: x }
    case 'updates':
      return { ...frame, scale: [x], decay: [x], gradient_norm: [x, x], update_rms: [x] }
    case 'receipt': {
      const seconds = { receive: x, queue: x, compute: x, send: x }
      return { ...frame, groups, gradient_norm: x, max_logit: x, seconds }
    }
    case 'error':
      return { ...frame, retry_after_seconds: x }
    case 'moved':
    case 'placed':
    case 'members':
      return frame
    case 'draining':
      return { ...frame, deadline_seconds: x }
    case 'checkpointed':
      return frame
  }
}

t.test('every float of the service is a float64, whole or not', async (t) => {
  const whole = fc.integer().map((value) => value * 1)
  const of = fc.oneof(whole, fc.double(), fc.constantFrom(0, -0, 1, -1, 2 ** 40))
  const values = fc.dictionary(
    fc.constantFrom('lr', 'betas', 'momentum', 'ns_coefficients', 'nesterov'),
    fc.oneof(of, fc.array(of), fc.array(fc.array(of)), fc.boolean()),
  )
  const property = fc.property(of, values, fc.integer({ min: 1, max: 9 }), (x, hyperparameters, ns_steps) => {
    const groups = { g: { ...hyperparameters, ns_steps, algorithm: 'muon' } }
    const frames = server.map((frame) => withFloats(frame, groups, x))
    for (const frame of frames) {
      const bytes = encodeFrame(frame)
      const found = floatBytes(cursorOf(bytes), SERVER_FRAMES[frame.type], frame.type)
      if (frame.type !== 'checkpointed') t.ok(found.length > 0)
      for (const [path, byte] of found) if (byte !== 0xcb) t.fail(`${path} begins with ${byte.toString(16)}`)
      t.same(decodeServerFrame(bytes), frame)
    }
  })
  fc.assert(property, { numRuns: 50, seed })
})

t.test('integers of every width are read again where any value may stand', async (t) => {
  const opened = server.find((frame) => frame.type === 'opened')!
  const numbers = [0, 127, 128, 255, 256, 65_535, 65_536, 2 ** 32 - 1, 2 ** 32, Number.MAX_SAFE_INTEGER]
  const below = [-1, -32, -33, -128, -129, -32_768, -32_769, -(2 ** 31), -(2 ** 31) - 1, Number.MIN_SAFE_INTEGER]
  const frame = { ...opened, limits: { chunk_bytes: 1, numbers: [...numbers, ...below] } }
  t.same(decodeServerFrame(encodeFrame(frame)), frame)
})

t.test('lengths of every width are read again', async (t) => {
  for (const length of [0, 15, 16, 31, 32, 255, 256, 65_535, 65_536]) {
    const keys = Object.fromEntries(Array.from({ length: Math.min(length, 3000) }, (_, i) => [`k${i}`, 1]))
    const row_scale = Buffer.alloc(length, 1)
    t.same(decodeServerFrame(encodeFrame({ type: 'update', parameter: 0, step: 1, offset: 0, row_scale })), {
      type: 'update',
      parameter: 0,
      step: 1,
      offset: 0,
      row_scale,
    })
    const receipt = { ...server[2]!, digest: 'ä'.repeat(length), clipped_heads: keys } as ServerFrame
    t.same(decodeServerFrame(encodeFrame(receipt)), receipt)
    const opened = { ...server[0]!, ahead: new Array(length).fill(7) } as ServerFrame
    t.same(decodeServerFrame(encodeFrame(opened)), opened)
  }
})

t.test('a client passes on keys it does not know, and refuses what it needs and lacks', async (t) => {
  t.match(decodeServerFrame(raw(['type', 'draining'], ['deadline_seconds', 1], ['reason', 'x'])), { reason: 'x' })
  t.throws(() => decodeServerFrame(raw(['type', 'draining'])), {
    code: 'FRAME_MALFORMED',
    message: /deadline_seconds is missing/,
  })
  t.equal(decodeServerFrame(raw(['type', 'greeting'], ['words', 1])), undefined, 'and ignores frames of other types')
  t.throws(() => decodeServerFrame(raw(['type', 1])), { code: 'FRAME_MALFORMED', message: /type .* is not a string/ })
})

t.test('integers stay integers beyond 32 bits, and other numbers floats', async (t) => {
  for (const step of [2 ** 31, 2 ** 32, 2 ** 40, Number.MAX_SAFE_INTEGER]) {
    t.match(decodeClientFrame(encodeFrame({ type: 'end', step }), LIMITS), { step })
  }
  for (const gradient_scale of [-(2 ** 31), -(2 ** 40), 1e300, 2 ** 53, 0.1]) {
    t.match(decodeClientFrame(encodeFrame({ type: 'step', step: 1, gradient_scale }), LIMITS), { gradient_scale })
  }
})

t.test('null and undefined in a list become nil, which the other side refuses by name', async (t) => {
  for (const x of [null, [undefined]]) {
    const bytes = encodeFrame({ type: 'step', step: 1, groups: { g: { x } } })
    t.throws(() => decodeClientFrame(bytes, LIMITS), { message: /step.groups.g.x(\[0\])? is a nil/ })
  }
})

/** Decodes a message, which must give a frame or throw a ServiceError. */
function survives(bytes: Uint8Array): boolean {
  try {
    decodeClientFrame(bytes, LIMITS)
  } catch (error) {
    if (!(error instanceof ServiceError)) throw error
  }
  peekGradient(bytes)
  return true
}

t.test('random bytes never break the decoder', async (t) => {
  fc.assert(fc.property(fc.uint8Array({ maxLength: 200 }), survives), { seed, numRuns: 3000 })
  const map = fc.uint8Array({ maxLength: 100 }).map((bytes) => Buffer.concat([hex('82 a474797065 a473746570'), bytes]))
  fc.assert(fc.property(map, survives), { seed, numRuns: 3000 })
  t.pass()
})

t.test(
  'a mutated frame never breaks the decoder, and a gradient that decodes is the one that was peeked',
  async (t) => {
    const mutation = fc.record({ at: fc.nat(), byte: fc.nat(255), cut: fc.boolean() })
    const message = fc.oneof(
      other.map((frame) => encodeFrame(frame)),
      fc.tuple(header, fc.uint8Array({ maxLength: 20 })).map(([head, data]) => encodeWithData(head, data)),
    )
    const mutated = fc.tuple(message, fc.array(mutation, { minLength: 1, maxLength: 3 })).map(([bytes, mutations]) => {
      let result = Buffer.from(bytes)
      for (const { at, byte, cut } of mutations) {
        if (cut) result = result.subarray(0, at % (result.length + 1))
        else if (result.length > 0) result[at % result.length] = byte
      }
      return result
    })
    fc.assert(
      fc.property(mutated, (bytes) => {
        survives(bytes)
        const peek = peekGradient(bytes)
        if (peek === undefined || peek === 'more' || peek.dataStart + peek.dataLength !== bytes.length) return
        const { parameter, step, offset, data } = decodeClientFrame(bytes, LIMITS) as GradientFrame
        t.same([parameter, step, offset, data.length], [peek.parameter, peek.step, peek.offset, peek.dataLength])
      }),
      { seed, numRuns: 2000 },
    )
  },
)

t.test('the worst messages of 16 MiB are refused for what they hold: a nest, or too many values', async (t) => {
  const bombs = [
    [0x80, 'FRAME_TOO_LARGE'],
    [0x90, 'FRAME_TOO_LARGE'],
    [0x91, 'FRAME_MALFORMED'],
    [0x01, 'FRAME_TOO_LARGE'],
  ] as const
  for (const [byte, code] of bombs) {
    const list = Buffer.concat([hex('dd'), uint32(2 ** 24 - 64), Buffer.alloc(2 ** 24 - 64, byte)])
    t.throws(() => decodeClientFrame(raw(['type', 'open'], ['attentions', list]), LIMITS), { code })
  }
})

t.test('text is measured in bytes', async (t) => {
  t.match(decodeClientFrame(raw(['type', 'checkpoint'], ['tag', str('größe ÷ 2 \ufeff')]), LIMITS), {
    tag: 'größe ÷ 2 \ufeff',
  })
})
