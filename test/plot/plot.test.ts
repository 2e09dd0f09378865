import fc from 'fast-check'
import t from 'tap'
import { figure, linePlot, type Plot } from '../../src/plot/plot.js'

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

t.test('a figure is its plots below each other, each with its own axes', (t) => {
  const svg = figure([
    { ...PLOT, height: 300 },
    { ...PLOT, legend: 'line' },
  ])
  t.match(svg, /height="740" viewBox="0 0 720 740"/)
  t.equal(svg.match(/translate\(0 300\)/g)?.length, 1)
  t.equal(coordinates(svg).length, 4)
  t.same(coordinates(svg)[1]![1], [696, 244])
  t.end()
})

t.test('a point is a dot where dots are asked for, and a name stands once in the legend', (t) => {
  const [one] = PLOT.series
  const series = [
    { ...one!, drawn: 'dots' as const, radius: 2 },
    { ...one!, drawn: 'both' as const, width: 1 },
  ]
  const svg = linePlot({ ...PLOT, series })
  const [line] = coordinates(svg)
  t.equal(coordinates(svg).length, 1)
  for (const [x, y] of line!) t.equal(svg.split(`<circle cx="${x}" cy="${y}"`).length, 3)
  t.match(svg, 'stroke-width="1"')
  for (const radius of [2, 4]) t.equal(svg.match(new RegExp(` r="${radius}"`, 'g'))?.length, line!.length)
  t.equal(texts(svg).filter((text) => text === 'one').length, 1)
  t.end()
})

t.test('an axis spans what it is asked to, and a mark is written over the lines', (t) => {
  const svg = linePlot({ ...PLOT, span: [0, 200] })
  t.same(coordinates(svg)[0]!.at(-1), [380, 300])
  t.ok(svg.indexOf('the mark') > svg.lastIndexOf('<polyline'))
  t.match(svg, /paint-order="stroke">the mark</)
  t.equal(
    coordinates(linePlot({ ...PLOT, series: [{ ...PLOT.series[0]!, points: [], drawn: 'dots' }], span: [0, 9] }))
      .length,
    0,
  )
  t.end()
})

t.test('a legend in a line stands below the title, over the plot', (t) => {
  const svg = linePlot({ ...PLOT, legend: 'line' })
  t.match(svg, /<text x="94" y="48"[^>]*>one</)
  t.match(svg, /<text x="161.6" y="48"[^>]*>two</)
  t.same(coordinates(svg)[0]![0], [64, 68])
  const long = { ...PLOT.series[0]!, name: 'a name of which two are too long for one line of a legend' }
  const two = linePlot({ ...PLOT, legend: 'line', series: [long, { ...long, name: `${long.name} too` }] })
  t.match(two, /<text x="94" y="48"/)
  t.match(two, /<text x="94" y="68"/)
  t.same(coordinates(two)[0]![0], [64, 88])
  t.end()
})

t.test('names stand along an axis in place of numbers', (t) => {
  const points: [number, number][] = [
    [0, 1],
    [1, 2],
  ]
  const svg = linePlot({ ...PLOT, names: ['64x64', '64x256'], series: [{ ...PLOT.series[0]!, points }] })
  for (const name of ['64x64', '64x256']) t.ok(texts(svg).includes(name), name)
  t.end()
})

t.test('logarithmic axes have powers of ten at equal distances', (t) => {
  const points: [number, number][] = [
    [1, 0.1],
    [100, 3],
    [10000, 1000],
  ]
  const svg = linePlot({ ...PLOT, marks: [], logarithmic: ['x', 'y'], series: [{ name: '', colour: '', points }] })
  t.same(texts(svg).map(Number).filter(Number.isFinite), [1, 10, 100, 1000, 10000, 0.1, 1, 10, 100, 1000, 0])
  t.same(coordinates(svg)[0]![1], [380, 259.9])
  t.end()
})
