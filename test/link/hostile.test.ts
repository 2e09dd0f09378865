import type { Socket } from 'node:net'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import type { ErrorCode } from '../../src/errors.js'
import { encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import {
  type ClientFrame,
  type GradientFrame,
  OPEN_BYTES,
  OTHER_KEYS_BYTES,
  type ServerFrame,
} from '../../src/wire/frame.js'
import { MAX_VALUES } from '../../src/wire/msgpack.js'
import { bytesOf, normal, RawClient, type Service, startService, told, turn } from '../service.js'
import {
  array,
  bin,
  FLOAT_ONE,
  gradient as gradientWith,
  hex,
  NIL,
  nested,
  opening,
  raw,
  step as stepWith,
  uint32,
} from '../wire/bytes.js'
import { rawFrame } from './websocket/raw-frame.js'

const ROUNDS = 6
const WARM_UP_ROUNDS = 2
// What is still referenced after a round is the same after every round, but for the assertions that tap keeps (about
// 0.5 MB a round). A closed connection that stays referenced keeps 128 KiB, and a round closes some ninety.
const RETAINED_GROWTH_BYTES = 8 << 20

const SETTINGS = { staging_bytes: 2 ** 20, chunk_bytes: 65_536, state_bytes_limit: 2 ** 28, lanes: 1, threads: 1 }
const GROUPS = [
  { name: 'muon', algorithm: 'muon' },
  { name: 'adamw', algorithm: 'adamw' },
  { name: 'sgd', algorithm: 'sgd' },
]
const PARAMETERS = [
  { name: 'matrix', shape: [8, 16], group: 'muon' },
  { name: 'brain', shape: [6], group: 'adamw', gradient_dtype: 'bfloat16' },
  { name: 'half', shape: [5], group: 'sgd', gradient_dtype: 'float16' },
  { name: 'bias', shape: [4], group: 'adamw' },
]
const MATRIX = normal(1, 8 * 16)

type OpenFrame = Extract<ClientFrame, { type: 'open' }>
type Message = Uint8Array | string
/** The bytes of a case, the service's answer, and its close code; without one the connection stays open. */
type Case = [what: string, messages: Message[], code: ErrorCode | undefined, close?: number]

const frame = (given: Exclude<ClientFrame, GradientFrame>) => encodeFrame(given)
const open = (keys: Partial<OpenFrame> = {}) => [
  frame({ type: 'open', protocol: 1, run: 'h', groups: GROUPS, parameters: PARAMETERS, ...keys }),
]
const group = (algorithm: string, hyperparameters: Record<string, unknown>) =>
  open({
    groups: [{ name: 'g', algorithm, ...hyperparameters }],
    parameters: [{ name: 'w', shape: [8, 16], group: 'g' }],
  })
const parameter = (keys: Record<string, unknown>) =>
  open({ parameters: [{ name: 'w', shape: [8, 16], group: 'muon', ...keys }] })
const healthy = (keys: Partial<OpenFrame>) => [
  frame({ type: 'open', protocol: 1, run: 'healthy', takeover: true, ...keys }),
]
const chunk = (at: number, step: number, [offset, data]: [number, Uint8Array]) =>
  encodeWithData({ type: 'gradient', parameter: at, step, offset }, data)
const whole = (at: number, data: Uint8Array, step = 1) => chunk(at, step, [0, data])
const step = (keys: Partial<Extract<ClientFrame, { type: 'step' }>>) => frame({ type: 'step', step: 1, ...keys })
const end = (number: number, skipped: number[] = []) => frame({ type: 'end', step: number, skipped })
const bytes = (count: number) => new Uint8Array(count)
const f32 = (...values: number[]) => bytesOf(Float32Array.from(values))
const u16 = (...values: number[]) => bytesOf(Uint16Array.from(values))
const half = bytesOf(MATRIX).subarray(0, 256)
const list32 = (count: number) => Buffer.concat([hex('dd'), uint32(count), Buffer.alloc(count)])

const PAIR = {
  parameters: [
    { name: 'q', shape: [8, 16], group: 'muon' },
    { name: 'k', shape: [8, 16], group: 'muon' },
    { name: 'b', shape: [4], group: 'adamw' },
  ],
}
const ATTENTION = { name: 'a', query_heads: 2, head_dim: 4, query: { parameter: 0 }, key: { parameter: 1 } }
const attention = (what: string, keys: object): Case[] => [
  [what, open({ ...PAIR, attentions: [{ ...ATTENTION, ...keys }] }), 'PARAMETER_INVALID'],
]

/** msgpack as a text message, which it is not: no UTF-8. It is told apart by what it is, as every case has messages of its own. */
const TEXT_OPEN = raw(['type', 'open'], ['run', hex('a1ff')])

/** On a connection that has opened nothing. */
const FRESH: Case[] = [
  ['a gradient before open', [whole(0, bytes(4))], 'FRAME_UNEXPECTED', 1002],
  ['a step before open', [step({})], 'FRAME_UNEXPECTED', 1002],
  ['an end before open', [end(1)], 'FRAME_UNEXPECTED', 1002],
  ['a checkpoint before open', [frame({ type: 'checkpoint' })], 'FRAME_UNEXPECTED', 1002],
  ['a text message', ['{"type":"open"}'], 'FRAME_MALFORMED', 1003],
  ['an open that was sent as text', [TEXT_OPEN], 'FRAME_MALFORMED', 1003],
  ['an empty message', [bytes(0)], 'FRAME_MALFORMED', 1002],
  ['JSON in a binary message', [Buffer.from('{"type":"open"}')], 'FRAME_MALFORMED', 1002],
  ['a list', [hex('90')], 'FRAME_MALFORMED', 1002],
  ['the byte that msgpack never uses', [hex('c1')], 'FRAME_MALFORMED', 1002],
  ['an empty map', [hex('80')], 'FRAME_MALFORMED', 1002],
  ['an unknown type', [raw(['type', 'gradients'])], 'FRAME_MALFORMED', 1002],
  ['a type out of Object.prototype', [raw(['type', 'constructor'])], 'FRAME_MALFORMED', 1002],
  ['a frame of the service', [raw(['type', 'receipt'])], 'FRAME_MALFORMED', 1002],
  ['bytes after the map', [Buffer.concat([step({}), hex('00')])], 'FRAME_MALFORMED', 1002],
  ['a map cut short', [step({ gradient_scale: 2 }).subarray(0, -1)], 'FRAME_MALFORMED', 1002],
  ['a duplicate key', [raw(['type', 'end'], ['step', 1], ['step', 1])], 'FRAME_MALFORMED', 1002],
  [
    'a duplicate hyperparameter',
    [opening(['groups', array(raw(['name', 'g'], ['algorithm', 'sgd'], ['lr', 1], ['lr', 1]))])],
    'FRAME_MALFORMED',
    1002,
  ],
  ['an integer as a key', [raw([hex('01'), 1])], 'FRAME_MALFORMED', 1002],
  ['a key that is not UTF-8', [raw([hex('a1ff'), 1])], 'FRAME_MALFORMED', 1002],
  ['nil', [opening(['client', NIL])], 'FRAME_MALFORMED', 1002],
  ['a timestamp', [opening(['client', hex('d6ff00000000')])], 'FRAME_MALFORMED', 1002],
  ['an extension', [opening(['client', hex('c7010100')])], 'FRAME_MALFORMED', 1002],
  ['an unknown key', [opening(['weights', 1])], 'FRAME_MALFORMED', 1002],
  [
    'an unknown key of a parameter',
    [opening(['parameters', array(raw(['name', 'w'], ['shape', array(1)], ['group', 'g'], ['shap', 1]))])],
    'FRAME_MALFORMED',
    1002,
  ],
  ['a prototype key', [opening(['__proto__', 1])], 'FRAME_MALFORMED', 1002],
  ['an open without a run', [raw(['type', 'open'], ['protocol', 1])], 'FRAME_MALFORMED', 1002],
  ['a path as a run name', open({ run: '../etc/passwd' }), 'FRAME_MALFORMED', 1002],
  ['a run name of 129 letters', open({ run: 'x'.repeat(129) }), 'FRAME_MALFORMED', 1002],
  ['a client of 257 characters', open({ client: 'x'.repeat(257) }), 'FRAME_MALFORMED', 1002],
  ['an unknown mode', [opening(['mode', 'destroy'])], 'FRAME_MALFORMED', 1002],
  [
    'a float in a shape',
    [opening(['parameters', array(raw(['name', 'w'], ['shape', array(FLOAT_ONE)], ['group', 'g']))])],
    'FRAME_MALFORMED',
    1002,
  ],
  ['takeover as an integer', [opening(['takeover', 1])], 'FRAME_MALFORMED', 1002],
  ['parameters as a map', [opening(['parameters', raw()])], 'FRAME_MALFORMED', 1002],
  ['a list bomb', [opening(['parameters', hex('ddffffffff')])], 'FRAME_MALFORMED', 1002],
  ['a map bomb', [hex('dfffffffff')], 'FRAME_MALFORMED', 1002],
  ['a text bomb', [raw(['type', hex('dbffffffff61')])], 'FRAME_MALFORMED', 1002],
  ['a nesting bomb', [opening(['attentions', nested(100_000)])], 'FRAME_MALFORMED', 1002],
  ['a bomb of two million values', [opening(['attentions', list32(MAX_VALUES + 1)])], 'FRAME_TOO_LARGE', 1009],
  ['an open beyond its limit', [opening(['client', bin(OPEN_BYTES)])], 'FRAME_TOO_LARGE', 1009],
  [
    'a message beyond every limit, which the WebSocket refuses',
    [bytes(OPEN_BYTES + OTHER_KEYS_BYTES + 1)],
    undefined,
    1009,
  ],
  ['another protocol version', [raw(['type', 'open'], ['protocol', 2], ['run', 'h'])], 'PROTOCOL_UNSUPPORTED', 1002],
  ['a protocol as text', [raw(['type', 'open'], ['protocol', '1'], ['run', 'h'])], 'FRAME_MALFORMED', 1002],
  [
    'a protocol beyond 2^53',
    [raw(['type', 'open'], ['protocol', hex('cfffffffffffffffff')], ['run', 'h'])],
    'FRAME_MALFORMED',
    1002,
  ],
  ['resuming a run that is not', open({ mode: 'resume' }), 'RUN_NOT_FOUND'],
  ['creating a run that is', open({ run: 'healthy', mode: 'create' }), 'RUN_EXISTS'],
  ['a run that has a connection', open({ run: 'healthy' }), 'RUN_BUSY'],
  [
    'resuming with another shape',
    healthy({ parameters: [{ name: 'matrix', shape: [8, 15], group: 'muon' }] }),
    'RUN_MISMATCH',
  ],
  ['resuming with fewer parameters', healthy({ parameters: PARAMETERS.slice(1) }), 'RUN_MISMATCH'],
  [
    'resuming with another algorithm',
    healthy({ groups: [{ name: 'muon', algorithm: 'sgd' }, ...GROUPS.slice(1)] }),
    'RUN_MISMATCH',
  ],
  ['resuming without a group', healthy({ groups: GROUPS.slice(1) }), 'RUN_MISMATCH'],
  [
    'resuming with a group too many',
    healthy({ groups: [...GROUPS, { name: 'more', algorithm: 'sgd' }] }),
    'RUN_MISMATCH',
  ],
  [
    'resuming with a bad hyperparameter',
    healthy({ groups: [{ name: 'muon', algorithm: 'muon', lr: -1 }, ...GROUPS.slice(1)] }),
    'HYPERPARAMETER_INVALID',
  ],
  ['a new run without groups', open({ groups: undefined }), 'PARAMETER_INVALID'],
  ['a new run without parameters', open({ parameters: undefined }), 'PARAMETER_INVALID'],
  ['no parameters', open({ parameters: [] }), 'PARAMETER_INVALID'],
  ['two parameters of one name', open({ parameters: [PARAMETERS[0]!, PARAMETERS[0]!] }), 'PARAMETER_INVALID'],
  ['two groups of one name', open({ groups: [GROUPS[0]!, GROUPS[0]!] }), 'PARAMETER_INVALID'],
  ['an empty group name', open({ groups: [{ name: '', algorithm: 'sgd' }] }), 'PARAMETER_INVALID'],
  ['an empty name', parameter({ name: '' }), 'PARAMETER_INVALID'],
  ['a name as long as a novel', parameter({ name: 'x'.repeat(1025) }), 'PARAMETER_INVALID'],
  ['an unknown group', parameter({ group: 'adam' }), 'PARAMETER_INVALID'],
  ['a group out of Object.prototype', parameter({ group: '__proto__' }), 'PARAMETER_INVALID'],
  ['a split that does not sum', parameter({ split: [3, 4] }), 'PARAMETER_INVALID'],
  ['a split with a negative part', parameter({ split: [9, -1] }), 'PARAMETER_INVALID'],
  ['heads that do not divide', parameter({ heads: 3 }), 'PARAMETER_INVALID'],
  ['split and heads', parameter({ split: [8], heads: 1 }), 'PARAMETER_INVALID'],
  ['three dimensions without matrices', parameter({ shape: [2, 2, 2] }), 'PARAMETER_INVALID'],
  ['one dimension for muon', parameter({ shape: [8] }), 'PARAMETER_INVALID'],
  ['unknown matrices', parameter({ shape: [2, 2, 2], matrices: 'rows' }), 'PARAMETER_INVALID'],
  ['a layout on adamw', parameter({ group: 'adamw', heads: 2 }), 'PARAMETER_INVALID'],
  ['a 0 in a shape', parameter({ shape: [8, 0] }), 'PARAMETER_INVALID'],
  ['a negative size', parameter({ shape: [-8, -16] }), 'PARAMETER_INVALID'],
  ['a shape of a million dimensions', parameter({ shape: new Array(1_000_000).fill(1) }), 'PARAMETER_INVALID'],
  ['more elements than a number counts', parameter({ shape: [2 ** 40, 2 ** 40] }), 'PARAMETER_INVALID'],
  ['a billion heads', parameter({ shape: [1e9, 1], heads: 1e9 }), 'PARAMETER_INVALID'],
  ['an unknown gradient_dtype', parameter({ gradient_dtype: 'float64' }), 'DTYPE_UNSUPPORTED'],
  ['an unknown update_dtype', parameter({ update_dtype: 'int8' }), 'DTYPE_UNSUPPORTED'],
  ['a matrix larger than the memory', parameter({ shape: [16_384, 16_384] }), 'OVER_CAPACITY'],
  [
    'more state than there is',
    open({ parameters: Array.from({ length: 400 }, (_, i) => ({ name: `w${i}`, shape: [512, 256], group: 'adamw' })) }),
    'OVER_CAPACITY',
  ],
  ['an unknown algorithm', group('lion', {}), 'HYPERPARAMETER_INVALID'],
  ['an algorithm out of Object.prototype', group('constructor', {}), 'HYPERPARAMETER_INVALID'],
  ['an unknown hyperparameter', group('muon', { learning_rate: 1 }), 'HYPERPARAMETER_INVALID'],
  ['a hyperparameter out of Object.prototype', group('muon', { toString: 1 }), 'HYPERPARAMETER_INVALID'],
  ['NaN as lr', group('adamw', { lr: Number.NaN }), 'HYPERPARAMETER_INVALID'],
  ['Inf as lr', group('sgd', { lr: Infinity }), 'HYPERPARAMETER_INVALID'],
  ['a lr beyond float32', group('sgd', { lr: 1e39 }), 'HYPERPARAMETER_INVALID'],
  ['a negative lr', group('muon', { lr: -1 }), 'HYPERPARAMETER_INVALID'],
  ['text as lr', group('muon', { lr: '0.1' }), 'HYPERPARAMETER_INVALID'],
  ['bytes as lr', group('muon', { lr: Buffer.alloc(1000) }), 'HYPERPARAMETER_INVALID'],
  ['a map as lr', group('muon', { lr: { value: 1 } }), 'HYPERPARAMETER_INVALID'],
  ['one beta', group('adamw', { betas: [0.9] }), 'HYPERPARAMETER_INVALID'],
  ['NaN as a beta', group('adamw', { betas: [0.9, Number.NaN] }), 'HYPERPARAMETER_INVALID'],
  ['momentum 1', group('sgd', { momentum: 1 }), 'HYPERPARAMETER_INVALID'],
  ['nesterov without momentum', group('sgd', { nesterov: true }), 'HYPERPARAMETER_INVALID'],
  ['no iterations', group('muon', { ns_steps: 0 }), 'HYPERPARAMETER_INVALID'],
  ['a billion iterations', group('muon', { ns_steps: 1e9 }), 'HYPERPARAMETER_INVALID'],
  [
    'iterations as a float',
    [opening(['groups', array(raw(['name', 'g'], ['algorithm', 'muon'], ['ns_steps', FLOAT_ONE]))])],
    'HYPERPARAMETER_INVALID',
  ],
  ['an unsafe coefficient set', group('muon', { ns_coefficients: [10, -20, 30] }), 'HYPERPARAMETER_INVALID'],
  ['NaN in a coefficient set', group('muon', { ns_coefficients: [[3, Number.NaN, 1]] }), 'HYPERPARAMETER_INVALID'],
  [
    'a coefficient set of 100 triples',
    group('muon', { ns_coefficients: new Array(100).fill([2, -1.5, 0.5]) }),
    'HYPERPARAMETER_INVALID',
  ],
  ['an unknown coefficient set', group('muon', { ns_coefficients: 'toString' }), 'HYPERPARAMETER_INVALID'],
  ['an attention without a name', [opening(['attentions', array(raw(['query_heads', 1]))])], 'FRAME_MALFORMED', 1002],
  ...attention('query rows beyond the parameter', { query: { parameter: 0, first_row: 1 } }),
  ...attention('a negative row', { key: { parameter: 1, first_row: -8 } }),
  ...attention('query and key in the same rows', { key: { parameter: 0 } }),
  ...attention('an unknown parameter', { key: { parameter: 99 } }),
  ...attention('a billion heads of one row', { query_heads: 1e9, head_dim: 1 }),
  ...attention('more heads than a safe integer', { query_heads: 2 ** 53 - 1, head_dim: 2 ** 53 - 1 }),
  ...attention('no heads', { query_heads: 0 }),
  ...attention('NaN as threshold', { threshold: Number.NaN }),
  ...attention('an unknown rule', { rule: 'constructor' }),
  ...attention('a bias with too few rows', { query_bias: { parameter: 2 } }),
  ['two attentions of one name', open({ ...PAIR, attentions: [ATTENTION, ATTENTION] }), 'PARAMETER_INVALID'],
  ['a float as heads', [opening(['attentions', array(raw(['query_heads', FLOAT_ONE]))])], 'FRAME_MALFORMED', 1002],
  ['text as an attention', [opening(['attentions', array('mha')])], 'FRAME_MALFORMED', 1002],
  ['a checkpoint to go back to', healthy({ mode: 'resume', checkpoint: 'c1' }), 'PARAMETER_INVALID'],
]

/** Cases on a connection that has opened run `h`, at step 1. */
const OPENED: Case[] = [
  ['a second open', open(), 'FRAME_UNEXPECTED', 1002],
  ['an index out of range', [whole(4, bytes(4))], 'PARAMETER_UNKNOWN'],
  ['the largest index', [whole(Number.MAX_SAFE_INTEGER, bytes(4))], 'PARAMETER_UNKNOWN'],
  ['a negative index', [gradientWith('parameter', -1)], 'FRAME_MALFORMED', 1002],
  ['a float as an offset', [gradientWith('offset', FLOAT_ONE)], 'FRAME_MALFORMED', 1002],
  ['text as data', [gradientWith('data', 'abcd')], 'FRAME_MALFORMED', 1002],
  ['step 0', [whole(0, half, 0)], 'STEP_CONFLICT'],
  ['a step too early', [whole(0, half, 2)], 'STEP_CONFLICT'],
  ['step n+1 before end n', [whole(0, bytesOf(MATRIX)), whole(0, bytesOf(MATRIX), 2)], 'STEP_CONFLICT'],
  ['the same step with other bytes', [whole(0, bytesOf(MATRIX)), whole(0, bytesOf(normal(2, 128)))], 'STEP_CONFLICT'],
  ['a refused gradient goes on in silence', [chunk(0, 2, [0, half]), chunk(0, 2, [256, half])], 'STEP_CONFLICT'],
  ['a first chunk that is not at 0', [chunk(0, 1, [4, half])], 'FRAME_UNEXPECTED', 1002],
  ['a gap', [chunk(0, 1, [0, half]), chunk(0, 1, [260, half])], 'FRAME_UNEXPECTED', 1002],
  ['an overlap', [chunk(0, 1, [0, half]), chunk(0, 1, [252, half])], 'FRAME_UNEXPECTED', 1002],
  ['a chunk of another parameter', [chunk(0, 1, [0, half]), whole(3, bytes(16))], 'FRAME_UNEXPECTED', 1002],
  ['a chunk of another step', [chunk(0, 1, [0, half]), chunk(0, 2, [256, half])], 'FRAME_UNEXPECTED', 1002],
  ['a step inside a gradient', [chunk(0, 1, [0, half]), step({})], 'FRAME_UNEXPECTED', 1002],
  ['an end inside a gradient', [chunk(0, 1, [0, half]), end(1)], 'FRAME_UNEXPECTED', 1002],
  ['an open inside a gradient', [chunk(0, 1, [0, half]), ...open()], 'FRAME_UNEXPECTED', 1002],
  ['nonsense inside a gradient', [chunk(0, 1, [0, half]), hex('c1')], 'FRAME_MALFORMED', 1002],
  ['a text inside a gradient', [chunk(0, 1, [0, half]), 'end'], 'FRAME_MALFORMED', 1003],
  ['an empty first chunk', [whole(0, bytes(0))], 'FRAME_UNEXPECTED', 1002],
  ['an empty chunk', [chunk(0, 1, [0, half]), chunk(0, 1, [256, bytes(0)])], 'FRAME_UNEXPECTED', 1002],
  ['a byte too many', [whole(3, bytes(17))], 'SHAPE_MISMATCH'],
  [
    'a byte too many at the end',
    [chunk(0, 1, [0, half]), chunk(0, 1, [256, bytes(257)]), chunk(0, 1, [513, half])],
    'SHAPE_MISMATCH',
  ],
  ['bfloat16 with half an element more', [whole(1, bytes(13))], 'SHAPE_MISMATCH'],
  ['bfloat16 with half an element less', [whole(1, bytes(11)), end(1)], 'FRAME_UNEXPECTED', 1002],
  ['float32 sent for float16', [whole(2, bytes(20))], 'SHAPE_MISMATCH'],
  ['a chunk beyond the limit', [whole(0, bytes(65_537))], 'FRAME_TOO_LARGE', 1009],
  [
    'a step frame beyond the limit',
    [step({ max_logits: { a: new Array(120_000).fill(0.5) } })],
    'FRAME_TOO_LARGE',
    1009,
  ],
  ['NaN in float32', [whole(3, f32(0, Number.NaN, 0, 0))], 'GRADIENT_NOT_FINITE'],
  ['-Inf in float32', [whole(3, f32(0, 0, 0, -Infinity))], 'GRADIENT_NOT_FINITE'],
  ['NaN in bfloat16', [whole(1, u16(0, 0, 0x7fc0, 0, 0, 0))], 'GRADIENT_NOT_FINITE'],
  ['Inf in bfloat16', [whole(1, u16(0xff80, 0, 0, 0, 0, 0))], 'GRADIENT_NOT_FINITE'],
  ['NaN in float16', [whole(2, u16(0, 0, 0, 0, 0x7e01))], 'GRADIENT_NOT_FINITE'],
  ['Inf in float16', [whole(2, u16(0x7c00, 0, 0, 0, 0))], 'GRADIENT_NOT_FINITE'],
  ['a square that overflows', [whole(3, f32(3e38, 3e38, 3e38, 3e38))], 'GRADIENT_NOT_FINITE'],
  ['a gradient_scale beyond float32', [step({ gradient_scale: 1e200 }), whole(3, bytes(16))], 'GRADIENT_NOT_FINITE'],
  ['NaN as gradient_scale', [step({ gradient_scale: Number.NaN })], 'HYPERPARAMETER_INVALID'],
  ['text as gradient_scale', [stepWith('gradient_scale', '1')], 'FRAME_MALFORMED', 1002],
  ['nil as a hyperparameter', [stepWith('groups', raw(['muon', raw(['lr', NIL])]))], 'FRAME_MALFORMED', 1002],
  ['NaN as a hyperparameter', [step({ groups: { muon: { lr: Number.NaN } } })], 'HYPERPARAMETER_INVALID'],
  ['an unsafe set in a step', [step({ groups: { muon: { ns_coefficients: [4, -4, 4] } } })], 'HYPERPARAMETER_INVALID'],
  ['a group that is not', [step({ groups: { more: {} } })], 'HYPERPARAMETER_INVALID'],
  ['another algorithm in a step', [step({ groups: { muon: { algorithm: 'adamw' } } })], 'HYPERPARAMETER_INVALID'],
  ['another state in a step', [step({ groups: { muon: { momentum_form: 'heavy_ball' } } })], 'HYPERPARAMETER_INVALID'],
  ['an attention that is not', [step({ max_logits: { attention: [1] } })], 'MAX_LOGITS_INVALID'],
  ['a step frame for step 0', [step({ step: 0 })], 'STEP_CONFLICT'],
  ['a step frame too early', [step({ step: 2 })], 'STEP_CONFLICT'],
  ['two step frames that differ', [step({ gradient_scale: 2 }), step({ gradient_scale: 3 })], 'STEP_CONFLICT'],
  ['a step frame after the gradient', [whole(3, bytes(16)), step({ gradient_scale: 2 })], 'STEP_CONFLICT'],
  ['end of step 0', [end(0)], 'STEP_CONFLICT'],
  ['end of a step too early', [end(2)], 'STEP_CONFLICT'],
  ['end without the gradients', [end(1)], 'STEP_INCOMPLETE'],
  ['skipping what was applied', [whole(3, bytes(16)), end(1, [0, 1, 2, 3])], 'STEP_CONFLICT'],
  ['skipping what is not', [end(1, [0, 1, 2, 3, 4])], 'PARAMETER_UNKNOWN'],
  ['skipping a negative index', [raw(['type', 'end'], ['step', 1], ['skipped', array(-1)])], 'FRAME_MALFORMED', 1002],
  ['a checkpoint where none is kept', [frame({ type: 'checkpoint', tag: 'now' })], 'PARAMETER_INVALID'],
]

/** Bytes below the messages: what breaks RFC 6455 is refused by ws, without an error frame. */
const SOCKET: Case[] = [
  ['a reserved opcode', [hex('83 80 00000000')], undefined, 1002],
  ['a reserved bit', [hex('c2 80 00000000')], undefined, 1002],
  ['a frame without a mask', [hex('82 01 80')], undefined, 1002],
  ['a continuation of nothing', [hex('80 80 00000000')], undefined, 1002],
  ['a ping of 126 bytes', [hex('89 fe 007e 00000000')], undefined, 1002],
  ['a message of 2^62 bytes', [hex('82 ff 4000000000000000 00000000')], undefined, 1009],
]

const NEXT: Case[1] = [whole(99, bytes(1))]
const NEXT_FRESH: Case[1] = [frame({ type: 'open', protocol: 1, run: 'nobody', mode: 'resume' })]

async function answer(client: RawClient): Promise<ServerFrame | undefined> {
  return Promise.race([client.next(), client.closed().then(() => undefined)])
}

function say(client: RawClient, messages: readonly Message[]): void {
  for (const message of messages)
    client.socket.send(message, { binary: typeof message !== 'string' && message !== TEXT_OPEN })
}

/** Sends a case on a connection of its own and compares the answer with the table. */
async function play(
  t: Test,
  { url }: Service,
  [what, messages, code, close]: Case,
  kind: 'fresh' | 'opened' | 'socket',
): Promise<void> {
  const client = await RawClient.connect(url)
  if (kind === 'opened') await client.open({ run: 'h', groups: GROUPS, parameters: PARAMETERS })
  if (kind === 'socket') for (const message of messages) Reflect.get(client.socket, '_socket').write(message)
  else say(client, messages)
  const told = await answer(client)
  if (told?.type === 'error' ? told.code !== code : code !== undefined)
    t.fail(`${what}: ${JSON.stringify(told)}, expected ${code}`)
  if (close !== undefined) {
    const { code: seen } = await client.closed()
    if (seen !== close) t.equal(seen, close, what)
    return
  }
  say(client, kind === 'opened' ? NEXT : NEXT_FRESH)
  const next = await answer(client)
  const expected = kind === 'opened' ? 'PARAMETER_UNKNOWN' : 'RUN_NOT_FOUND'
  if (next?.type !== 'error' || next.code !== expected)
    t.match(next, { type: 'error', code: expected }, `after ${what} the connection is open`)
  await client.close()
}

/** A run that gets the same gradients in every step; `step` returns the digest. */
async function steadyRun(url: string, run: string) {
  const client = await RawClient.connect(url)
  await client.open({ run, groups: GROUPS, parameters: PARAMETERS })
  const gradients = [bytesOf(MATRIX), u16(1, 2, 3, 4, 5, 6), u16(6, 5, 4, 3, 2), f32(1, 2, 3, 4)]
  const step = async (number: number) => {
    say(client, [...gradients.map((data, index) => whole(index, data, number)), end(number)])
    return (await client.expect('receipt')).digest
  }
  return { client, step }
}

/** Bytes of the heap and of buffers that are referenced. A garbage collection frees what nothing refers to. */
async function retainedBytes(): Promise<number> {
  setFlagsFromString('--expose-gc')
  const collect: () => void = runInNewContext('gc')
  // What a closed socket leaves to do is done in the next turns.
  await turn()
  collect()
  await turn()
  collect()
  const { heapUsed, arrayBuffers } = process.memoryUsage()
  return heapUsed + arrayBuffers
}

const figures = ({ device, runs }: Service) => ({
  staging: device.staging.used,
  waiting: device.staging.waiting,
  state: device.memory.bytes,
  admitted: device.admittedBytes,
  runs: runs.list().map((run) => run.name),
})

t.test('whatever is sent is refused by its code, and nothing of it stays', async (t) => {
  const service = await startService(SETTINGS)
  const cases = [
    ...FRESH.map((row) => ({ row, kind: 'fresh' as const })),
    ...OPENED.map((row) => ({ row, kind: 'opened' as const })),
    ...SOCKET.map((row) => ({ row, kind: 'socket' as const })),
  ]
  t.ok(cases.length >= 60, `${cases.length} cases`)
  const calm = await steadyRun(service.url, 'calm')
  const digests: string[] = []
  for (let step = 1; step <= ROUNDS * cases.length + 1; step++) digests.push(await calm.step(step))
  const healthy = await steadyRun(service.url, 'healthy')
  t.equal(await healthy.step(1), digests[0])
  const before = figures(service)
  let step = 1
  let warm = 0
  for (let round = 1; round <= ROUNDS; round++) {
    for (const { row, kind } of cases) {
      await play(t, service, row, kind)
      if (kind === 'opened') await service.runs.delete('h')
      if ((await healthy.step(++step)) !== digests[step - 1]) t.fail(`the healthy run's digest after ${row[0]}`)
    }
    t.same(figures(service), before, `round ${round}: staging, state and runs are what they were`)
    if (round === WARM_UP_ROUNDS) warm = await retainedBytes()
  }
  const growth = (await retainedBytes()) - warm
  t.ok(growth < RETAINED_GROWTH_BYTES, `${ROUNDS - WARM_UP_ROUNDS} rounds left ${growth} bytes behind`)
  t.equal(await told(service, 'INTERNAL'), 0)
  await calm.client.close()
  await healthy.client.close()
  await service.app.close()
})

/** Valid frames of a short training, to be damaged. */
const VALID: Buffer[] = [
  ...open({ run: 'fuzz', takeover: true }),
  step({ groups: { muon: { lr: 0.1, ns_steps: 3 }, adamw: { betas: [0.5, 0.5] } }, gradient_scale: 0.5 }),
  whole(0, bytesOf(MATRIX)),
  chunk(0, 1, [0, half]),
  chunk(0, 1, [256, half]),
  whole(1, bytes(12)),
  whole(2, bytes(10)),
  whole(3, f32(1, 2, 3, 4)),
  end(1, [0, 1]),
  end(1),
  frame({ type: 'checkpoint', tag: 't' }),
]

type Damage = { at: number; kind: 'keep' | 'flip' | 'cut' | 'insert' | 'double'; place: number; bytes: Uint8Array }

function damaged({ at, kind, place, bytes }: Damage): Buffer {
  const valid = VALID[at]!
  const split = place % valid.length
  const [head, tail] = [valid.subarray(0, split), valid.subarray(split)]
  if (kind === 'keep') return valid
  if (kind === 'cut') return head
  if (kind === 'insert') return Buffer.concat([head, bytes, tail])
  if (kind === 'double') return Buffer.concat([head, tail, tail])
  return Buffer.concat([
    head,
    Buffer.from(tail.subarray(0, bytes.length).map((byte, i) => byte ^ bytes[i]!)),
    tail.subarray(bytes.length),
  ])
}

t.test('random bytes and damaged frames never get INTERNAL, and the service goes on', async (t) => {
  const service = await startService({ ...SETTINGS, max_runs: 1_000_000 })
  const calm = await steadyRun(service.url, 'calm')
  const healthy = await steadyRun(service.url, 'healthy')
  const random = fc.uint8Array({ minLength: 1, maxLength: 40 })
  const damage = fc.record({
    at: fc.nat({ max: VALID.length - 1 }),
    kind: fc.constantFrom('keep', 'keep', 'flip', 'cut', 'insert', 'double'),
    place: fc.nat({ max: 2000 }),
    bytes: fc.uint8Array({ minLength: 1, maxLength: 4 }),
  })
  const message = fc.oneof({ weight: 1, arbitrary: random }, { weight: 9, arbitrary: damage.map(damaged) })
  let steps = 0
  const property = fc.asyncProperty(fc.boolean(), fc.array(message, { maxLength: 12 }), async (opens, messages) => {
    const client = await RawClient.connect(service.url)
    if (opens)
      client.send({ type: 'open', protocol: 1, run: 'fuzz', groups: GROUPS, parameters: PARAMETERS, takeover: true })
    // A text message comes last: the service ends the connection for it once it has handled everything before.
    say(client, [...messages, 'the end'])
    const { code } = await client.closed()
    steps += 1
    const [expected, seen] = [await calm.step(steps), await healthy.step(steps)]
    const alive = seen === expected && [1002, 1003, 1009].includes(code)
    const untouched = service.device.staging.used === 0 && (await told(service, 'INTERNAL')) === 0
    return alive && untouched
  })
  await fc.assert(property, { seed: 11, numRuns: 400 })
  t.ok(
    service.runs.list().some((run) => run.name === 'fuzz' && run.epoch > 50),
    'the frames that stayed whole were served',
  )
  t.equal(service.device.failed, undefined)
  for (const { name } of service.runs.list()) if (name !== 'calm' && name !== 'healthy') await service.runs.delete(name)
  t.equal(service.runs.list().length, 2)
  await calm.client.close()
  await healthy.client.close()
  await service.app.close()
})

/** `count` frames with a mask of zeros, below 126 bytes each. */
const flood = (first: number, payload: Uint8Array, count: number) =>
  Buffer.concat(new Array<Buffer>(count).fill(rawFrame(first, payload, new Uint8Array(4))))

t.test('a client that asks for more than it reads is told so and closed: answers pile up to a bound', async (t) => {
  const service = await startService(SETTINGS)
  const names = Array.from({ length: 10 }, (_, i) => `${i}${'x'.repeat(1000)}`)
  const parameters = names.map((name) => ({ name, shape: [1], group: 'sgd' }))
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters })
  client.socket.pause()
  const socket: Socket = Reflect.get(client.socket, '_socket')
  const refusals = flood(0x82, end(1), 100)
  while ((await told(service, 'OVERLOADED')) === 0) {
    if (socket.writableLength === 0) socket.write(refusals)
    await turn()
  }
  client.socket.resume()
  t.equal((await client.closed()).code, 1013)
  await service.app.close()
})
