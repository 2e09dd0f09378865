import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { Ajv } from 'ajv'
import t from 'tap'
import { parse } from 'yaml'
import { decodeClientFrame, decodeServerFrame } from '../../src/wire/codec.js'
import { CLIENT_FRAMES, SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import { ASYNCAPI, asyncapi, bytesOf, FRAMES } from './asyncapi.js'

type Example = { name: string; payload: object }
type Message = { payload: object; examples: Example[]; 'x-msgpack': Record<string, string> }

const text = readFileSync(ASYNCAPI, 'utf8')
const document = parse(text)
const messages: Record<string, Message> = document.components.messages
const TYPES = [...Object.keys(CLIENT_FRAMES), ...Object.keys(SERVER_FRAMES)]

t.test('asyncapi.yaml is what the schemas of the frames lead to', async (t) => {
  t.equal(text, asyncapi(), '`npm run asyncapi` makes it')
  t.same(Object.keys(messages), TYPES)
})

t.test('it is a document of AsyncAPI 3.0', async (t) => {
  const specification = createRequire(import.meta.url)('@asyncapi/specs/schemas/3.0.0-without-$id.json')
  const ajv = new Ajv({ strict: false, validateFormats: false, allErrors: true })
  const validate = ajv.compile(specification)
  validate(document)
  t.same(validate.errors, null)
  t.notOk(validate({ ...document, channels: { stream: { adress: '/' } } }), 'and another one is none')
})

t.test('every reference leads somewhere', async (t) => {
  for (const [, path] of text.matchAll(/\$ref: "?(#[\w/]+)/g)) {
    const found = path!
      .split('/')
      .slice(1)
      .reduce((node, key) => node?.[key], document)
    t.ok(found, path)
  }
})

t.test('the codec decodes every example, encodes it to the same bytes, and its schema has it', async (t) => {
  for (const type of TYPES) {
    const { payload: schema, examples, 'x-msgpack': hexadecimal } = messages[type]!
    const frames = FRAMES.filter((frame) => frame.type === type)
    t.ok(frames.length > 0 && frames.length === examples.length, `${type} has examples`)
    const validate = new Ajv({ strict: false }).compile(schema)
    for (const [i, { name, payload }] of examples.entries()) {
      const hex = hexadecimal[name]!
      const bytes = Buffer.from(hex, 'hex')
      const decoded = type in CLIENT_FRAMES ? decodeClientFrame(bytes, { chunk_bytes: 4096 }) : decodeServerFrame(bytes)
      t.same(decoded, frames[i], name)
      t.equal(bytesOf(frames[i]!).toString('hex'), hex, name)
      t.ok(validate(payload), name)
      t.same(Object.keys(payload), Object.keys(frames[i]!), name)
      t.notOk(validate({ ...payload, type: 'other' }), name)
      t.equal(validate({ ...payload, unknown: 1 }), type in SERVER_FRAMES, `${name}: only the service may add keys`)
    }
  }
})
