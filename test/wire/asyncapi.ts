import { readFileSync } from 'node:fs'
import { stringify } from 'yaml'
import { VERSION } from '../../src/config.js'
import { encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import type { ClientFrame, ServerFrame } from '../../src/wire/frame.js'
import { CLIENT_FRAMES, SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import type { MapSchema, Schema } from '../../src/wire/schema.js'
import { EXAMPLE } from './example.js'

// asyncapi.yaml as the frames' schemas, docs/protocol.md and the worked example lead to it.

type Frame = ClientFrame | ServerFrame
/** A JSON schema, or a part of the document. */
type Node = Record<string, unknown>

export const ASYNCAPI = 'asyncapi.yaml'
const CHANNEL = { $ref: '#/channels/stream' }

/** What answers each frame of a client, beside `error`. */
const REPLIES: Readonly<Record<ClientFrame['type'], readonly ServerFrame['type'][]>> = {
  open: ['opened', 'moved', 'placed'],
  step: [],
  gradient: ['update'],
  gradients: ['updates', 'update'],
  end: ['receipt', 'update'],
  checkpoint: ['checkpointed'],
}
/** Frames of the service that answer nothing. */
const UNASKED: readonly ServerFrame['type'][] = ['members', 'draining', 'error']

const NONCE = Buffer.alloc(32, 7)
/** A frame of every type that the worked example has none of. */
const OTHERS: readonly Frame[] = [
  {
    type: 'open',
    protocol: 1,
    run: 'demo',
    mode: 'resume',
    takeover: true,
    transport: [{ kind: 'shm', nonce: NONCE, process: 4242, descriptors: [20, 21] }],
  },
  { type: 'step', step: 2, groups: { all: { lr: 0.25 } }, gradient_scale: 0.5, max_logits: { 'layer.0': [31.5, 118] } },
  { type: 'gradients', step: 1, parameters: [0, 1] },
  { type: 'checkpoint', tag: 'best' },
  {
    type: 'updates',
    step: 1,
    replayed: false,
    parameters: [0],
    scale: [-0.5],
    decay: [0],
    gradient_norm: [2],
    update_rms: [1],
  },
  { type: 'moved', run: 'demo', url: 'ws://10.0.0.2:8787/v1/stream' },
  {
    type: 'placed',
    run: 'demo',
    generation: 1_796_000_000_000,
    step: 0,
    resumed: false,
    digest: 'd'.repeat(64),
    shards: [
      { run: 'demo~0', url: 'ws://10.0.0.2:8787/v1/stream', parameters: [[0, 1]] },
      { run: 'demo~1', url: 'ws://10.0.0.3:8787/v1/stream', parameters: [[1, 3]] },
    ],
    limits: { chunk_bytes: 4_194_304 },
    server: { name: 'muond', version: VERSION, device: 'cpu' },
  },
  { type: 'checkpointed', checkpoint: '0-000000000100', step: 100, digest: 'd'.repeat(64), bytes: 4096 },
  {
    type: 'error',
    code: 'STEP_CONFLICT',
    message: 'step 3 does not come next, expected step 2',
    status: 409,
    retryable: false,
    step: 3,
    expected_step: 2,
  },
  { type: 'draining', deadline_seconds: 30 },
]

export const FRAMES: readonly Frame[] = [...EXAMPLE.map(({ frame }) => frame), ...OTHERS]

/** The bytes of a frame, `data` as the last key. */
export function bytesOf(frame: Frame): Buffer {
  if (frame.type !== 'gradient' && !(frame.type === 'update' && frame.data)) return encodeFrame(frame)
  const { data = new Uint8Array(), ...header } = frame
  return encodeWithData(header, data)
}

/** The text of asyncapi.yaml. */
export function asyncapi(): string {
  const comment = '# Made by `npm run asyncapi` from src/wire/frame-schemas.ts and docs/protocol.md.\n'
  return comment + stringify(documentOf(), { lineWidth: 120, aliasDuplicateObjects: false })
}

function documentOf(): Node {
  const types = [...Object.keys(CLIENT_FRAMES), ...Object.keys(SERVER_FRAMES)]
  const schemas: Readonly<Record<string, MapSchema>> = { ...CLIENT_FRAMES, ...SERVER_FRAMES }
  return {
    asyncapi: '3.0.0',
    info: {
      title: 'muond stream',
      version: VERSION,
      description:
        'The data plane of muond: one WebSocket, every message binary and one msgpack map. docs/protocol.md says what each frame means and when it may come; openapi.yaml is the control plane. `bin` of msgpack is base64 here, and `x-msgpack` has the bytes of each example in hexadecimal.',
      license: { name: 'Apache-2.0' },
    },
    defaultContentType: 'application/msgpack',
    servers: {
      local: { host: '127.0.0.1:8787', protocol: 'ws', security: [{ $ref: '#/components/securitySchemes/bearer' }] },
    },
    channels: {
      stream: {
        address: '/v1/stream',
        description: 'One connection opens one run, and is its only writer or one of its members.',
        messages: Object.fromEntries(types.map((type) => [type, { $ref: `#/components/messages/${type}` }])),
        bindings: { ws: { method: 'GET', bindingVersion: '0.1.0' } },
      },
    },
    operations: { ...receiving(), ...sending() },
    components: {
      securitySchemes: { bearer: { type: 'http', scheme: 'bearer', description: 'A key with the scope step.' } },
      messages: Object.fromEntries(types.map((type) => [type, messageOf(type, schemas[type]!)])),
    },
  }
}

const messages = (types: readonly string[]) => types.map((type) => ({ $ref: `#/channels/stream/messages/${type}` }))

function receiving(): Node {
  const entries = Object.entries(REPLIES).map(([type, replies]) => {
    const reply = { channel: CHANNEL, messages: messages([...replies, 'error']) }
    return [`receive_${type}`, { action: 'receive', channel: CHANNEL, messages: messages([type]), reply }] as const
  })
  return Object.fromEntries(entries)
}

function sending(): Node {
  const entries = UNASKED.map((type) => {
    return [`send_${type}`, { action: 'send', channel: CHANNEL, messages: messages([type]) }] as const
  })
  return Object.fromEntries(entries)
}

function messageOf(type: string, schema: MapSchema): Node {
  const payload = schemaOf(schema)
  const properties = payload.properties as Record<string, Node>
  for (const [key, meaning] of meaningsOf(type)) if (properties[key]) properties[key].description = meaning
  properties.type = { const: type }
  const frames = FRAMES.filter((frame) => frame.type === type)
  const examples = frames.map((frame, i) => ({
    name: `${type}_${i + 1}`,
    payload: JSON.parse(JSON.stringify(frame, (_, value) => readable(value))),
  }))
  const from = Object.hasOwn(CLIENT_FRAMES, type) ? 'client' : 'service'
  const bytes = Object.fromEntries(frames.map((frame, i) => [`${type}_${i + 1}`, bytesOf(frame).toString('hex')]))
  return { name: type, summary: `A frame of the ${from}.`, payload, examples, 'x-msgpack': bytes }
}

/** A Buffer has become an object of its own by the time that JSON asks. */
function readable(value: unknown): unknown {
  const isBuffer = typeof value === 'object' && value !== null && 'type' in value && value.type === 'Buffer'
  return isBuffer && 'data' in value ? Buffer.from(value.data as number[]).toString('base64') : value
}

function schemaOf(schema: Schema): Node {
  switch (schema.is) {
    case 'string':
      return { type: 'string' }
    case 'name':
      return { type: 'string', pattern: patternOf(schema.pattern) }
    case 'bool':
      return { type: 'boolean' }
    case 'int':
      return { type: 'integer' }
    case 'uint':
      return { type: 'integer', minimum: 0 }
    case 'float':
      return { type: 'number' }
    case 'bin':
      return { type: 'string', contentEncoding: 'base64' }
    case 'list':
      return { type: 'array', items: schemaOf(schema.of) }
    case 'dictionary':
      return { type: 'object', additionalProperties: schemaOf(schema.of) }
    case 'map':
      return mapOf(schema)
    default:
      return {}
  }
}

/** JSON schema knows no flags: with `s` a dot is any character. */
function patternOf({ source, flags }: RegExp): string {
  return flags.includes('s') ? source.replaceAll('.', '[\\s\\S]') : source
}

function mapOf({ required, optional, rest }: MapSchema): Node {
  const properties = Object.entries({ ...required, ...optional }).map(([key, of]) => [key, schemaOf(of)])
  return {
    type: 'object',
    required: Object.keys(required),
    properties: Object.fromEntries(properties),
    additionalProperties: rest !== undefined,
  }
}

/** What the table of a frame in docs/protocol.md says of its keys. */
function meaningsOf(type: string): [string, string][] {
  const text = readFileSync('docs/protocol.md', 'utf8')
  const [, section = ''] = text.split(`\n### \`${type}\`\n`)
  /* c8 ignore next -- every section has a table */
  const [table = ''] = /^(\|.*\n)+/m.exec(section) ?? []
  return table.split('\n').flatMap((row) => {
    const [, keys = '', , meaning = ''] = row.split('|').map((cell) => cell.trim())
    const plain = meaning.replace(/\[([^\]]*)\]\([^)]*\)/g, '$1').trim()
    return plain === '' ? [] : [...keys.matchAll(/`(\w+)`/g)].map(([, key]): [string, string] => [key!, plain])
  })
}
