/** One line of a plot: its points in data units, in drawing order. */
export type Series = { name: string; colour: string; points: readonly (readonly [number, number])[] }

/** What a plot shows. `marks` are horizontal dashed lines, each with the text written at its left end. */
export type Plot = {
  title: string
  xLabel: string
  yLabel: string
  series: readonly Series[]
  marks?: readonly { y: number; text: string }[]
}

const SIZE = { width: 720, height: 440 } as const
const AREA = { left: 64, right: 696, top: 48, bottom: 384 } as const
const TICKS = 6

type Scale = { place: (value: number) => number; ticks: readonly number[]; digits: number }

/** A line plot as one SVG document of 720 x 440 pixels, without scripts, fonts or style sheets of its own. */
export function linePlot(plot: Plot): string {
  const points = plot.series.flatMap((series) => series.points)
  const x = scale(extent(points.map((point) => point[0])), [AREA.left, AREA.right])
  const y = scale(extent([...points.map((point) => point[1]), ...(plot.marks ?? []).map((mark) => mark.y)]), [
    AREA.bottom,
    AREA.top,
  ])
  const parts = [
    `<rect width="${SIZE.width}" height="${SIZE.height}" fill="white"/>`,
    text(plot.title, { x: AREA.left, y: 28, size: 16 }),
    ...xAxis(x, plot.xLabel),
    ...yAxis(y, plot.yLabel),
    ...(plot.marks ?? []).flatMap((mark) => dashed(y.place(mark.y), mark.text)),
    ...plot.series.map((series) => line(series, x, y)),
    ...plot.series.flatMap(legend),
  ]
  const { width, height } = SIZE
  const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`
  return `${head} font-family="sans-serif">\n${parts.join('\n')}\n</svg>\n`
}

function extent(values: readonly number[]): [number, number] {
  const low = Math.min(...values)
  const high = Math.max(...values)
  return low === high ? [low - 0.5, high + 0.5] : [low, high]
}

// The range is widened to whole ticks of 1, 2 or 5 times a power of ten, which are the ones a reader can divide.
function scale([low, high]: [number, number], [from, to]: [number, number]): Scale {
  const step = tickStep((high - low) / TICKS)
  const first = Math.floor(low / step + 1e-9)
  const last = Math.ceil(high / step - 1e-9)
  return {
    place: (value) => from + ((value / step - first) / (last - first)) * (to - from),
    ticks: Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step),
    digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)),
  }
}

function tickStep(rough: number): number {
  const power = 10 ** Math.floor(Math.log10(rough))
  return power * ([1, 2, 5].find((factor) => factor * power >= rough * (1 - 1e-9)) ?? 10)
}

function xAxis({ place, ticks, digits }: Scale, label: string): string[] {
  const marks = ticks.flatMap((tick) => [
    stroke({ x1: place(tick), y1: AREA.bottom, x2: place(tick), y2: AREA.bottom + 5 }, '#444'),
    text(tick.toFixed(digits), { x: place(tick), y: AREA.bottom + 20, anchor: 'middle' }),
  ])
  const axis = stroke({ x1: AREA.left, y1: AREA.bottom, x2: AREA.right, y2: AREA.bottom }, '#444')
  return [axis, ...marks, text(label, { x: (AREA.left + AREA.right) / 2, y: AREA.bottom + 44, anchor: 'middle' })]
}

function yAxis({ place, ticks, digits }: Scale, label: string): string[] {
  const marks = ticks.flatMap((tick) => [
    stroke({ x1: AREA.left, y1: place(tick), x2: AREA.right, y2: place(tick) }, '#e4e4e4'),
    text(tick.toFixed(digits), { x: AREA.left - 8, y: place(tick) + 4, anchor: 'end' }),
  ])
  const middle = (AREA.top + AREA.bottom) / 2
  return [...marks, text(label, { x: 16, y: middle, anchor: 'middle', turn: -90 })]
}

function dashed(y: number, label: string): string[] {
  const line = stroke({ x1: AREA.left, y1: y, x2: AREA.right, y2: y }, '#888').replace(
    '/>',
    ' stroke-dasharray="5 4"/>',
  )
  return [line, text(label, { x: AREA.left + 6, y: y - 5, fill: '#666' })]
}

function line(series: Series, x: Scale, y: Scale): string {
  const points = series.points.map((point) => `${fixed(x.place(point[0]))},${fixed(y.place(point[1]))}`).join(' ')
  return `<polyline fill="none" stroke="${series.colour}" stroke-width="2" points="${points}"/>`
}

function legend(series: Series, row: number): string[] {
  const y = AREA.top + 16 + row * 20
  const x = AREA.right - 190
  const sample = `<rect x="${x}" y="${y - 5}" width="22" height="3" fill="${series.colour}"/>`
  return [sample, text(series.name, { x: x + 30, y })]
}

function stroke(ends: { x1: number; y1: number; x2: number; y2: number }, colour: string): string {
  const places = Object.entries(ends).map(([key, value]) => `${key}="${fixed(value)}"`)
  return `<line ${places.join(' ')} stroke="${colour}"/>`
}

type TextPlace = { x: number; y: number; size?: number; anchor?: string; turn?: number; fill?: string }

function text(content: string, { x, y, size = 12, anchor = 'start', turn, fill = '#222' }: TextPlace): string {
  const rotation = turn === undefined ? '' : ` transform="rotate(${turn} ${fixed(x)} ${fixed(y)})"`
  const place = `x="${fixed(x)}" y="${fixed(y)}" font-size="${size}" text-anchor="${anchor}" fill="${fill}"`
  return `<text ${place}${rotation}>${escaped(content)}</text>`
}

function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

function fixed(value: number): string {
  return String(Math.round(value * 10) / 10)
}
