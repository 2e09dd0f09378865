import { logScale, nameScale, type Scale, scale } from './scale.js'

/** One line of a plot: its points in data units, in drawing order. */
export type Series = {
  /** Series of one name share one entry of the legend. */
  name: string
  colour: string
  points: readonly (readonly [number, number])[]
  /** A line (the default), one dot for each point, or both. */
  drawn?: 'line' | 'dots' | 'both'
  /** Radius of the dots in pixels, 4 unless given. */
  radius?: number
  /** Width of the line in pixels, 2 unless given. */
  width?: number
  /** Whether the line is dashed. */
  dashed?: boolean
  /** Light bars from the least to the most y at an x, each as wide as all of them are apart. */
  spread?: readonly (readonly [x: number, least: number, most: number])[]
}

/** What a plot shows. `marks` are horizontal dashed lines, each with the text written at its left end. */
export type Plot = {
  title: string
  xLabel: string
  yLabel: string
  /** The lines of the plot, at least one. */
  series: readonly Series[]
  marks?: readonly { y: number; text: string }[]
  /** Vertical dashed lines, each with a text at its upper end where that has room beside the one before. */
  verticals?: readonly { x: number; text: string }[]
  /** The part of the x axis that is shown in any case, whatever the points are. */
  span?: readonly [number, number]
  /** Names along the x axis in place of numbers; a point's x is an index into them. */
  names?: readonly string[]
  /** Axes in powers of ten; all values on them are above 0. */
  logarithmic?: readonly ('x' | 'y')[]
  /**
   * Where the legend stands: in the upper right corner, or, where that is taken, on lines below the title; none where
   * another plot of the figure has it.
   */
  legend?: 'corner' | 'line' | 'none'
  /** Pixels, 440 unless given. */
  height?: number
}

const WIDTH = 720
const HEIGHT = 440
const AREA = { left: 64, right: 696, top: 48 } as const
const BELOW = 56
const LEGEND_LINE = 20

type Area = { top: number; bottom: number; height: number }

/** A line plot as one SVG document of 720 pixels' width, without scripts, fonts or style sheets of its own. */
export function linePlot(plot: Plot): string {
  return figure([plot])
}

/** Several plots, one below the other, as one SVG document. */
export function figure(plots: readonly Plot[]): string {
  const heights = plots.map(({ height = HEIGHT }) => height)
  const total = heights.reduce((sum, height) => sum + height, 0)
  const panels = plots.map((plot, i) => {
    const y = heights.slice(0, i).reduce((sum, height) => sum + height, 0)
    const content = panel(plot, heights[i])
    return y === 0 ? content : `<g transform="translate(0 ${y})">\n${content}\n</g>`
  })
  const head = `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${total}" viewBox="0 0 ${WIDTH} ${total}"`
  return `${head} font-family="sans-serif">\n${panels.join('\n')}\n</svg>\n`
}

function panel(plot: Plot, height: number): string {
  const { series, marks = [], verticals = [], logarithmic = [] } = plot
  const entries = legendOf(plot)
  const lines = plot.legend === 'line' ? entries[entries.length - 1].y - AREA.top + LEGEND_LINE : 0
  const area: Area = { top: AREA.top + lines, bottom: height - BELOW, height }
  const points = series.flatMap((one) => [...one.points, ...endsOf(one)])
  const axis = (name: 'x' | 'y') => (logarithmic.includes(name) ? logScale : scale)
  const width: [number, number] = [AREA.left, AREA.right]
  const xs = [...points.map((point) => point[0]), ...(plot.span ?? [])]
  const x = plot.names === undefined ? axis('x')(xs, width) : nameScale(plot.names, width)
  const y = axis('y')([...points.map((point) => point[1]), ...marks.map((mark) => mark.y)], [area.bottom, area.top])
  return [
    `<rect width="${WIDTH}" height="${height}" fill="white"/>`,
    text(plot.title, { x: AREA.left, y: 28, size: 16 }),
    ...xAxis(x, plot.xLabel, area),
    ...yAxis(y, plot.yLabel, area),
    ...marks.map((mark) => horizontal(y.place(mark.y))),
    ...verticals.map((mark) => vertical(x.place(mark.x), area)),
    ...series.flatMap((one) => bars(one, x, y)),
    ...series.flatMap((one) => drawing(one, x, y)),
    ...marks.map((mark) => text(mark.text, { x: AREA.left + 6, y: y.place(mark.y) - 5, fill: '#666', halo: true })),
    ...verticalTexts(verticals, x, area),
    ...entries.flatMap(entry),
  ].join('\n')
}

function xAxis({ place, ticks, label: labelOf }: Scale, label: string, { bottom }: Area): string[] {
  const marks = ticks.flatMap((tick) => [
    stroke({ x1: place(tick), y1: bottom, x2: place(tick), y2: bottom + 5 }, '#444'),
    text(labelOf(tick), { x: place(tick), y: bottom + 20, anchor: 'middle' }),
  ])
  const axis = stroke({ x1: AREA.left, y1: bottom, x2: AREA.right, y2: bottom }, '#444')
  return [axis, ...marks, text(label, { x: (AREA.left + AREA.right) / 2, y: bottom + 44, anchor: 'middle' })]
}

function yAxis({ place, ticks, label: labelOf }: Scale, label: string, { top, bottom }: Area): string[] {
  const marks = ticks.flatMap((tick) => [
    stroke({ x1: AREA.left, y1: place(tick), x2: AREA.right, y2: place(tick) }, '#e4e4e4'),
    text(labelOf(tick), { x: AREA.left - 8, y: place(tick) + 4, anchor: 'end' }),
  ])
  return [...marks, text(label, { x: 16, y: (top + bottom) / 2, anchor: 'middle', turn: -90 })]
}

const DASHES = 'stroke-dasharray="5 4"'
const VERTICAL_TEXT_WIDTH = 64

function horizontal(y: number): string {
  return dashed(stroke({ x1: AREA.left, y1: y, x2: AREA.right, y2: y }, '#888'))
}

function vertical(x: number, { top, bottom }: Area): string {
  return dashed(stroke({ x1: x, y1: top, x2: x, y2: bottom }, '#888'))
}

function dashed(line: string): string {
  return line.replace('/>', ` ${DASHES}/>`)
}

/** Texts left of their lines where the right edge is near. */
function verticalTexts(verticals: NonNullable<Plot['verticals']>, { place }: Scale, { top }: Area): string[] {
  let right = Number.NEGATIVE_INFINITY
  return verticals
    .toSorted((one, other) => one.x - other.x)
    .flatMap(({ x, text: content }) => {
      const at = place(x)
      const isNearEdge = at + VERTICAL_TEXT_WIDTH > AREA.right
      const left = isNearEdge ? at - VERTICAL_TEXT_WIDTH : at
      if (left < right) return []
      right = left + VERTICAL_TEXT_WIDTH
      const anchor = isNearEdge ? 'end' : 'start'
      return [text(content, { x: at + (isNearEdge ? -4 : 4), y: top + 10, size: 11, anchor, fill: '#666', halo: true })]
    })
}

/** Both ends of every bar. */
function endsOf({ spread = [] }: Series): (readonly [number, number])[] {
  return spread.flatMap(([x, least, most]) => [[x, least] as const, [x, most] as const])
}

function bars({ spread = [], colour }: Series, x: Scale, y: Scale): string[] {
  if (spread.length === 0) return []
  const places = spread.map((bar) => x.place(bar[0]))
  const width = (places[places.length - 1] - places[0]) / Math.max(1, places.length - 1)
  const path = spread.map(
    ([, least, most], i) => `M${fixed(places[i])} ${fixed(y.place(least))}V${fixed(y.place(most))}`,
  )
  return [`<path stroke="${colour}" stroke-width="${fixed(width)}" stroke-opacity="0.14" d="${path.join('')}"/>`]
}

function drawing({ points, colour, drawn = 'line', ...style }: Series, x: Scale, y: Scale): string[] {
  const { width = 2, radius = 4, dashed: isDashed = false } = style
  const places = points.map((point): [string, string] => [fixed(x.place(point[0])), fixed(y.place(point[1]))])
  const dashes = isDashed ? ` ${DASHES}` : ''
  const line = `<polyline fill="none" stroke="${colour}" stroke-width="${width}"${dashes} points="${places.map((place) => place.join(',')).join(' ')}"/>`
  const dots = places.map(
    ([cx, cy]) => `<circle cx="${cx}" cy="${cy}" r="${radius}" fill="${colour}" fill-opacity="0.8"/>`,
  )
  return { line: [line], dots, both: [line, ...dots] }[drawn]
}

function legendOf({ series, legend }: Plot): Entry[] {
  if (legend === 'none') return []
  return legend === 'line' ? lineLegend(series) : cornerLegend(series)
}

type Entry = { name: string; colour: string; x: number; y: number }

function cornerLegend(series: readonly Series[]): Entry[] {
  return named(series).map((one, row) => ({ ...one, x: AREA.right - 190, y: AREA.top + 16 + row * LEGEND_LINE }))
}

/** Lays the legend's entries out from left to right; an entry that does not fit begins another line. */
function lineLegend(series: readonly Series[]): Entry[] {
  let right: number = AREA.left
  let y: number = AREA.top
  return named(series).map((one) => {
    const width = 46 + 7.2 * one.name.length
    if (right + width > WIDTH) [right, y] = [AREA.left, y + LEGEND_LINE]
    right += width
    return { ...one, x: right - width, y }
  })
}

function named(series: readonly Series[]): { name: string; colour: string }[] {
  const first = series.filter(({ name }, i) => series.findIndex((other) => other.name === name) === i)
  return first.map(({ name, colour }) => ({ name, colour }))
}

function entry({ name, colour, x, y }: Entry): string[] {
  const sample = `<rect x="${fixed(x)}" y="${y - 5}" width="22" height="3" fill="${colour}"/>`
  return [sample, text(name, { x: x + 30, y })]
}

function stroke(ends: { x1: number; y1: number; x2: number; y2: number }, colour: string): string {
  const places = Object.entries(ends).map(([key, value]) => `${key}="${fixed(value)}"`)
  return `<line ${places.join(' ')} stroke="${colour}"/>`
}

/** A text element; `halo` gives it a white rim, for text that lines may cross. */
type TextPlace = { x: number; y: number; size?: number; anchor?: string; turn?: number; fill?: string; halo?: boolean }

function text(content: string, { x, y, size = 12, anchor = 'start', turn, fill = '#222', halo }: TextPlace): string {
  const rotation = turn === undefined ? '' : ` transform="rotate(${turn} ${fixed(x)} ${fixed(y)})"`
  const rim = halo ? ' stroke="white" stroke-width="4" paint-order="stroke"' : ''
  const place = `x="${fixed(x)}" y="${fixed(y)}" font-size="${size}" text-anchor="${anchor}" fill="${fill}"`
  return `<text ${place}${rim}${rotation}>${escaped(content)}</text>`
}

function escaped(content: string): string {
  return content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

function fixed(value: number): string {
  return String(Math.round(value * 10) / 10)
}
