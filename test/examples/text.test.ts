import fc from 'fast-check'
import t from 'tap'
import {
  examplesAt,
  fixedPositions,
  randomPositions,
  readCorpus,
  seededRandom,
  windowsAt,
} from '../../examples/text.js'

t.test('the last tenth of every file is held out, in the order of the names', (t) => {
  const root = t.testdir({
    kernels: { 'b.ts': 'bbbbbbbbbB', 'a.ts': 'aaaaaaaaaA', 'a.d.ts': 'generated' },
    src: { deep: { 'c.ts': 'cccccccccccccccccCCC' }, 'notes.txt': 'not a source' },
    test: {},
    examples: {},
    docs: { 'd.md': 'd' },
  })
  const { train, validation, files } = readCorpus(root)
  t.equal(Buffer.from(train).toString(), `${'a'.repeat(9)}${'b'.repeat(9)}${'c'.repeat(17)}C`)
  t.equal(Buffer.from(validation).toString(), 'ABCCd')
  t.equal(files, 4)
  t.end()
})

t.test('every example is a target and the bytes right before it', (t) => {
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 5, maxLength: 200 }), fc.nat(), (bytes, seed) => {
      const fixed = fixedPositions(bytes, { count: 9, context: 4 })
      const drawn = randomPositions(seededRandom(seed), bytes, { count: 9, context: 4 })
      return areExamplesOf(bytes, fixed) && areExamplesOf(bytes, drawn)
    }),
    { seed: 1 },
  )
  t.end()
})

function areExamplesOf(bytes: Uint8Array, positions: Int32Array): boolean {
  const { tokens, targets } = examplesAt(bytes, positions, 4)
  return positions.every((position, i) => {
    const context = Buffer.from([...tokens.subarray(i * 4, i * 4 + 4)].map(Number))
    return context.equals(bytes.subarray(position - 4, position)) && Number(targets[i]) === bytes[position]
  })
}

t.test('a window is read shifted by one byte: every byte has the next one to guess', (t) => {
  const { tokens, targets } = windowsAt(Buffer.from('abcdefgh'), Int32Array.of(3, 7), 3)
  t.equal(Buffer.from([...tokens].map(Number)).toString(), 'abcefg')
  t.equal(Buffer.from([...targets].map(Number)).toString(), 'bcdfgh')
  t.end()
})

t.test('fixed positions are spread over the whole text', (t) => {
  t.same([...fixedPositions(new Uint8Array(104), { count: 4, context: 4 })], [4, 29, 54, 79])
  t.end()
})

t.test('a seed decides its numbers, which are uniform', (t) => {
  const numbers = (seed: number) => Array.from({ length: 10_000 }, seededRandom(seed))
  t.same(numbers(1), numbers(1))
  t.notSame(numbers(1).slice(0, 9), numbers(2).slice(0, 9))
  t.ok(numbers(5).every((value) => value >= 0 && value < 1))
  t.ok(Math.abs(numbers(5).reduce((sum, value) => sum + value, 0) / 10_000 - 0.5) < 0.01)
  t.end()
})
