import { readdirSync, readFileSync } from 'node:fs'
import t from 'tap'
import { decodeClientFrame, decodeServerFrame } from '../../src/wire/codec.js'
import { CLIENT_FRAMES, SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import { encode, GOLDEN_FRAMES, jsonOf, keysOf, senderOf } from './golden-frames.js'

for (const { path, frame } of GOLDEN_FRAMES) {
  t.test(`${path} is what the encoder writes and the decoder reads`, async (t) => {
    const bytes = readFileSync(`${path}.msgpack`)
    t.ok(bytes.equals(encode(frame)), 'npm run frames writes the files anew')
    const fromClient = senderOf(frame) === 'client'
    t.same(fromClient ? decodeClientFrame(bytes, { chunk_bytes: 2 ** 22 }) : decodeServerFrame(bytes), frame)
    t.equal(readFileSync(`${path}.json`, 'utf8'), jsonOf(bytes))
  })
}

t.test('docs/frames has these files and no others', async (t) => {
  const files = readdirSync('docs/frames', { recursive: true, encoding: 'utf8' })
  const expected = GOLDEN_FRAMES.flatMap(({ path }) => [`${path}.json`, `${path}.msgpack`])
  t.same(
    files.filter((name) => /\.(json|msgpack)$/.test(name)).sort(),
    expected.map((name) => name.replace('docs/frames/', '')).sort(),
  )
})

t.test('every key that a frame may have is in one of the files', async (t) => {
  for (const [type, schema] of Object.entries({ ...CLIENT_FRAMES, ...SERVER_FRAMES })) {
    const written = GOLDEN_FRAMES.filter(({ frame }) => frame.type === type)
    const text = written.map(({ path }) => readFileSync(`${path}.json`, 'utf8')).join()
    for (const key of keysOf(schema)) t.match(text, `"${key}":`, `${type}: ${key}`)
  }
})

t.test('JSON tells a float from an integer', async (t) => {
  const text = readFileSync('docs/frames/service/receipt.json', 'utf8')
  t.match(text, '"gradient_norm": 2.0')
  t.match(text, '"ns_steps": 5,')
})
