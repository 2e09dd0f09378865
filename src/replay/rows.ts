import type { Groups } from '../optimizer/hyperparameters.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { Declaration } from '../run/declaration.js'
import type { Alternative } from './alternative.js'
import type { Measure } from './measurer.js'

/**
 * Parameters that are summed up together: a group of the run, or the part of one that a group of the alternative has.
 */
export type Row = {
  readonly name: string
  /** The group of the run, and its algorithm. */
  readonly group: string
  readonly algorithm: string
  /** The group of the alternative, if it has these parameters. */
  readonly alternative?: { readonly group: string; readonly algorithm: string; readonly begins: Beginning }
  readonly parameters: readonly Parameter[]
}

/** Whether parameters of an alternative begin with the state that the run had there, or with none. */
export type Beginning = 'state' | 'no state'

/** Of an update, scale · data: the L2 norm and the root of the mean square of its elements. */
export type Size = { readonly update_norm: number; readonly update_rms: number }

/** What a step came to for a row. `largest` is the parameter whose gradient has the largest norm. */
export type RowStep = Size & {
  readonly lr: number
  readonly gradient_norm: number
  readonly largest: { readonly parameter: string; readonly gradient_norm: number }
  /** `ratio` is that of the norms, `cosine` that of the angle between both updates; left out where one is 0. */
  readonly alternative?: Size & { readonly lr: number; readonly ratio?: number; readonly cosine?: number }
}

/** The rows of a run: each group, or each part of one that another group of the alternative has, or none. */
export function rowsOf({ groups, parameters }: Declaration, alternative: Alternative | undefined): Row[] {
  const others = othersOf(alternative)
  const parts = new Map<string, Parameter[]>()
  for (const parameter of parameters) {
    const key = JSON.stringify([parameter.group, others.get(parameter.index)?.group])
    const known = parts.get(key)
    if (known) known.push(parameter)
    else parts.set(key, [parameter])
  }
  const all = [...parts.values()]
  return all.map((own) => {
    const [{ group, index }] = own
    const other = others.get(index)
    const isWhole = all.filter(([first]) => first.group === group).length === 1
    const name = isWhole ? group : `${group}, ${other?.group ?? 'as it was'}`
    const row = { name, group, algorithm: algorithmIn(groups, group), parameters: own }
    return other ? { ...row, alternative: other } : row
  })
}

/** The group that an alternative has each parameter of the run in, by the parameter's index. */
function othersOf(alternative: Alternative | undefined): Map<number, NonNullable<Row['alternative']>> {
  if (!alternative) return new Map()
  const { declaration, indices, keeps } = alternative
  const entries = declaration.parameters.map(({ group }, i) => {
    const begins: Beginning = keeps[i] ? 'state' : 'no state'
    return [indices[i], { group, algorithm: algorithmIn(declaration.groups, group), begins }] as const
  })
  return new Map(entries)
}

function algorithmIn(groups: Groups, name: string): string {
  return String(groups.get(name)?.algorithm)
}

/** A step of a row; undefined where none of its parameters was applied. */
export function sumUp(
  row: Row,
  measures: readonly Measure[],
  groups: Groups,
  others: Groups | undefined,
): RowStep | undefined {
  const byIndex = new Map(measures.map((measure) => [measure.index, measure]))
  const own = row.parameters.flatMap((parameter) => {
    const measure = byIndex.get(parameter.index)
    return measure ? [{ parameter, measure }] : []
  })
  if (own.length === 0) return undefined
  const total = (of: (measure: Measure) => number) => own.reduce((sum, { measure }) => sum + of(measure), 0)
  const elements = own.reduce((sum, { parameter }) => sum + parameter.elements, 0)
  const size = (square: number) => ({ update_norm: Math.sqrt(square), update_rms: Math.sqrt(square / elements) })
  const square = total((measure) => measure.square)
  const largest = own.reduce((one, other) => (other.measure.gradient_norm > one.measure.gradient_norm ? other : one))
  const step = {
    lr: lrOf(groups, row.group),
    gradient_norm: Math.sqrt(total(({ gradient_norm }) => gradient_norm ** 2)),
    largest: { parameter: largest.parameter.name, gradient_norm: largest.measure.gradient_norm },
    ...size(square),
  }
  if (!row.alternative || !others) return step
  const otherSquare = total(({ other }) => other.square)
  const cosine = total(({ other }) => other.product) / (Math.sqrt(square) * Math.sqrt(otherSquare))
  const ratio = Math.sqrt(otherSquare / square)
  return {
    ...step,
    alternative: {
      ...{ lr: lrOf(others, row.alternative.group), ...size(otherSquare) },
      ...(Number.isFinite(ratio) && { ratio }),
      ...(Number.isFinite(cosine) && { cosine: Math.max(-1, Math.min(1, cosine)) }),
    },
  }
}

function lrOf(groups: Groups, name: string): number {
  return Number(groups.get(name)?.hyperparameters.lr)
}
