import t from 'tap'
import { bytesPerElement, elementsPerBlock, tensorBytes } from '../../kernels/dtype.js'
import { findingNotFinite } from '../../src/run/step/not-finite.js'
import { Extent, Ranges } from '../../src/wire/ranges.js'

const INFINITE = { float32: 0x7f800000, bfloat16: 0x7f80, float16: 0x7c00 } as const
const ELEMENTS = 700_000

t.test('one element that is not finite is found anywhere in a part, and none outside of it', async (t) => {
  for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
    const unit = bytesPerElement(dtype)
    const extent = new Extent(new Ranges([[1, ELEMENTS - 1]]), unit)
    for (const [at, expected] of [
      [0, false],
      [1, true],
      [ELEMENTS - 2, true],
      [ELEMENTS - 1, false],
    ] as const) {
      const bytes = new Uint8Array(ELEMENTS * unit)
      const view = new DataView(bytes.buffer)
      if (unit === 4) view.setUint32(at * unit, INFINITE[dtype], true)
      else view.setUint16(at * unit, INFINITE[dtype], true)
      const finding = findingNotFinite(bytes, extent, dtype)
      let found = finding.next()
      while (!found.done) found = finding.next()
      t.equal(found.value, expected, `${dtype} element ${at}`)
    }
  }
})

t.test('a scale that is not finite is found in any block of a part, and none outside of it', async (t) => {
  for (const dtype of ['int8_block256', 'int4_block64'] as const) {
    const block = elementsPerBlock(dtype)
    // More bytes than are looked at in one turn, and a short block at the end.
    const elements = 2 ** 22 + 5
    const extent = Extent.of(dtype, new Ranges([[block, elements]]))
    for (const [at, expected] of [
      [0, false],
      [block, true],
      [elements - 5, true],
    ] as const) {
      // The integers of all other blocks look like NaN.
      const bytes = new Uint8Array(tensorBytes(dtype, elements)).fill(0xff)
      for (let first = 0; first < elements; first += block)
        bytes.fill(0, tensorBytes(dtype, first), tensorBytes(dtype, first) + 2)
      bytes.set([0x80, 0xff], tensorBytes(dtype, at))
      const finding = findingNotFinite(bytes, extent, dtype)
      let found = finding.next()
      while (!found.done) found = finding.next()
      t.equal(found.value, expected, `${dtype} element ${at}`)
    }
  }
})

t.test('a long piece behind short ones travels alone', async (t) => {
  const extent = new Extent(
    new Ranges([
      [0, 10],
      [20, 20 + 65_536],
    ]),
    1,
  )
  t.same(
    [...extent.cuts(2 ** 20)].map(({ offset, length }) => [offset, length]),
    [
      [0, 10],
      [20, 65_536],
    ],
  )
})
