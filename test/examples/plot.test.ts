import fc from 'fast-check'
import t from 'tap'
import { linePlot, type Plot } from '../../examples/plot.js'

const PLOT: Plot = {
  title: 'a < b & c',
  xLabel: 'step',
  yLabel: 'loss',
  series: [
    {
      name: 'one',
      colour: 'red',
      points: [
        [0, 3],
        [50, 2],
        [100, 1.5],
      ],
    },
    {
      name: 'two',
      colour: 'blue',
      points: [
        [0, 3],
        [100, 1],
      ],
    },
  ],
  marks: [{ y: 1.5, text: 'the mark' }],
}

const coordinates = (svg: string) =>
  [...svg.matchAll(/points="([^"]*)"/g)].map((match) => match[1].split(' ').map((pair) => pair.split(',').map(Number)))
const texts = (svg: string) => [...svg.matchAll(/<text [^>]*>([^<]*)<\/text>/g)].map((match) => match[1])

t.test('a plot names its axes, its series and its marks', (t) => {
  const shown = texts(linePlot(PLOT))
  for (const text of ['a &lt; b &amp; c', 'step', 'loss', 'one', 'two', 'the mark']) t.ok(shown.includes(text), text)
  t.end()
})

t.test('ticks are whole multiples of 1, 2 or 5 times a power of ten', (t) => {
  const shown = texts(linePlot(PLOT)).map(Number).filter(Number.isFinite)
  t.same(shown, [0, 20, 40, 60, 80, 100, 1, 1.5, 2, 2.5, 3])
  t.end()
})

t.test('points stand where the axes say', (t) => {
  t.same(coordinates(linePlot(PLOT)), [
    [
      [64, 48],
      [380, 216],
      [696, 300],
    ],
    [
      [64, 48],
      [696, 384],
    ],
  ])
  t.end()
})

t.test('every finite series lies within the axes', (t) => {
  const number = fc.double({ min: -1e6, max: 1e6, noNaN: true }).map((value) => Math.round(value * 1e3) / 1e3)
  fc.assert(
    fc.property(fc.array(fc.tuple(number, number), { minLength: 1, maxLength: 20 }), (points) => {
      const [line] = coordinates(linePlot({ ...PLOT, marks: undefined, series: [{ name: '', colour: '', points }] }))
      return line.every(([x, y]) => x >= 64 && x <= 696 && y >= 48 && y <= 384)
    }),
    { seed: 1 },
  )
  t.end()
})
