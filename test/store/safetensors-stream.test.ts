import fc from 'fast-check'
import t from 'tap'
import { encodeHeader } from '../../src/store/safetensors.js'
import { readStream } from '../../src/store/safetensors-stream.js'

const TENSORS = [
  { name: 'a', dtype: 'F32', shape: [2], bytes: 8 },
  { name: 'none', dtype: 'F32', shape: [0], bytes: 0 },
  { name: 'b', dtype: 'BF16', shape: [3], bytes: 6 },
] as const
const BODY = Buffer.concat([encodeHeader(TENSORS, { said: 'yes' }), Buffer.from('abcdefghABCDEF')])

async function received(pieces: Iterable<Uint8Array>, bytes?: number, headerBytes = 1000) {
  const tensors: Record<string, string> = {}
  let metadata: object | undefined
  await readStream(
    (async function* () {
      yield* pieces
    })(),
    {
      headerBytes,
      bytes,
      opened: (header) => {
        ;({ metadata } = header)
        return ({ name }) => {
          tensors[name] = ''
          return (piece) => {
            tensors[name] += Buffer.from(piece).toString()
          }
        }
      },
    },
  )
  return { metadata, tensors }
}

t.test('a body is read whatever its pieces are', async (t) => {
  await fc.assert(
    fc.asyncProperty(fc.array(fc.integer({ min: 0, max: 120 }), { maxLength: 30 }), async (cuts) => {
      const pieces: Uint8Array[] = []
      let at = 0
      for (const cut of cuts) {
        pieces.push(BODY.subarray(at, at + cut))
        at += cut
      }
      pieces.push(BODY.subarray(at))
      t.same(await received(pieces), { metadata: { said: 'yes' }, tensors: { a: 'abcdefgh', none: '', b: 'ABCDEF' } })
    }),
    { numRuns: 100, seed: 26 },
  )
  t.same(await received([encodeHeader([])], undefined), { metadata: {}, tensors: {} })
})

t.test('a body that ends early or goes on is refused, with its length and without', async (t) => {
  for (const bytes of [undefined, BODY.length]) {
    for (let length = 0; length < BODY.length; length++)
      await t.rejects(received([BODY.subarray(0, length)], bytes), {
        name: 'SafetensorsError',
        message: /the body ends after \d+ bytes/,
      })
    await t.rejects(received([BODY, Buffer.from('x')], bytes), {
      message: /^the body has \d+ bytes or more, its last tensor ends at \d+$/,
    })
  }
  await t.rejects(received([BODY], BODY.length + 1), { message: /tensors end at byte 14, the data has 15 bytes/ })
})

t.test('a header longer than it may be is refused by its first bytes', async (t) => {
  const pieces = (function* () {
    yield BODY.subarray(0, 8)
    throw new Error('more was asked for')
  })()
  await t.rejects(received(pieces, undefined, 20), { message: /^header claims \d+ bytes, at most 20 are possible$/ })
})

t.test('a body is given up where its reader refuses it', async (t) => {
  let ended = false
  const body = (async function* () {
    try {
      yield BODY
    } finally {
      ended = true
    }
  })()
  const opened = () => {
    throw new Error('refused')
  }
  await t.rejects(readStream(body, { headerBytes: 1000, opened }), { message: 'refused' })
  t.ok(ended)
})
