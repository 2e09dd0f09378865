import { readFileSync } from 'node:fs'
import t from 'tap'
import { ERRORS } from '../../src/errors.js'
import { decodeClientFrame, decodeServerFrame } from '../../src/wire/codec.js'
import { CLIENT_FRAMES, SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import { hex } from './bytes.js'
import { EXAMPLE, fingerprint } from './example.js'
import { encode, keysOf } from './golden-frames.js'

// The columns of a table may be padded.
const documentation = readFileSync('docs/protocol.md', 'utf8').replace(/ {2,}/g, ' ')

/** The text from a heading to the next one of its level. */
function section(heading: string): string {
  const start = documentation.indexOf(`\n${heading}\n`)
  if (start < 0) throw new Error(`docs/protocol.md has no heading '${heading}'`)
  const level = heading.slice(0, heading.indexOf(' ') + 1)
  const end = documentation.indexOf(`\n${level}`, start + 1)
  return documentation.slice(start, end < 0 ? undefined : end)
}

/** The bytes of the hex block under a heading; text behind # on a line explains them. */
function bytesUnder(heading: string): Buffer {
  const block = /```text\n([\s\S]*?)```/.exec(section(heading))
  const lines = block?.[1].split('\n') ?? []
  return hex(lines.map((line) => line.split('#')[0]).join(''))
}

EXAMPLE.forEach(({ heading, frame }, index) => {
  t.test(`the documented bytes of ${heading} are those of the codec, both ways`, async (t) => {
    const bytes = bytesUnder(`### ${index + 1}. \`${heading}\``)
    t.equal(bytes.toString('hex'), encode(frame).toString('hex'))
    const fromClient = Object.hasOwn(CLIENT_FRAMES, frame.type)
    t.same(fromClient ? decodeClientFrame(bytes, { chunk_bytes: 4096 }) : decodeServerFrame(bytes), frame)
  })
})

t.test('the documented fingerprints are those of the definition', async (t) => {
  const rows = [...section('## Fingerprint').matchAll(/^\| `([0-9a-f ]*)` \| `([0-9a-f]{16})` \|$/gm)]
  t.ok(rows.length >= 4)
  for (const [, bytes, value] of rows) t.equal(fingerprint(hex(bytes)).toString(16).padStart(16, '0'), value)
})

t.test('every key of every frame is in its section', async (t) => {
  for (const [type, schema] of Object.entries({ ...CLIENT_FRAMES, ...SERVER_FRAMES })) {
    const text = section(`### \`${type}\``)
    for (const key of keysOf(schema)) t.ok(text.includes(`\`${key}\``), `${type}: ${key}`)
  }
})

t.test('every error code is in the table of errors with its status and close code', async (t) => {
  const text = section('## Errors')
  for (const [code, row] of Object.entries(ERRORS)) {
    const line = text.split('\n').find((candidate) => candidate.startsWith(`| \`${code}\``)) ?? ''
    const close = 'close' in row ? String(row.close) : ''
    t.ok(line.startsWith(`| \`${code}\` | ${row.status} | ${row.retryable ? 'yes' : 'no'} | ${close}`), code)
  }
})
