import assert from 'node:assert'
import { readFileSync } from 'node:fs'
import { ConfigError, type Environment, readArguments } from '../config.js'
import { errorText } from '../errors.js'
import { type Attention, claimsOf } from '../optimizer/attention.js'
import { type Explanation, explain, layoutName, layoutReason } from '../optimizer/explanation.js'
import { effective, type Group, groupOf, show } from '../optimizer/hyperparameters.js'
import { describe, type Parameter } from '../optimizer/parameter.js'
import { type Declaration, declarationOf, refuseUnsupported } from '../run/declaration.js'
import { readPresets } from '../store/presets.js'
import { tableLines } from '../text-table.js'
import { atOnce } from '../wire/at-once.js'
import { decodeClientFrame, encodeFrame } from '../wire/codec.js'
import { OPEN_BYTES, type OpenFrame } from '../wire/frame.js'
import { amount, decimal } from './amount.js'
import { presetsFolder } from './presets.js'

const HELP = `muond explain PARAMETERS.json [--json] [--presets DIR]

Says what a step of each parameter would be, and why, without running anything.
PARAMETERS.json is an \`open\` frame: groups and parameters; type, protocol and
run may be left out. What \`open\` would refuse is refused with the same words.

  f       what adjust_lr_fn multiplies lr with
  state   bytes that muond keeps from the first step on
  FLOPs   of one step, as the CPU computes: every product of Newton-Schulz in
          full, 4m²n + 2m³ per iteration (m the shorter side), and the
          elementwise part; docs/algorithms.md, "What a step costs"

  --json         Prints the same facts as JSON
  --presets DIR  Folder with presets of your own; also MUOND_PRESETS
  --help         Prints this`

type Row = { readonly parameter: Parameter; readonly group: Group; readonly plan: Explanation }
export type Totals = { parameters: number; elements: number; state_bytes: number; flops: number }

/**
 * `muond explain`: returns the text to print, in lines of at most `width` characters if shorter names allow it.
 * Throws ConfigError for its arguments and the file, and ServiceError as `open` would.
 */
export function explainCommand(argv: readonly string[], env: Environment, width?: number): string {
  const { values, positionals } = readArguments(argv, { json: 'boolean', presets: 'string', help: 'boolean' })
  if (values.help) return HELP
  const [file, ...more] = positionals
  if (file === undefined || more.length > 0) throw new ConfigError('explain takes one file (--help says what is in it)')
  const presets = readPresets(presetsFolder(values, env))
  const frame = readOpenFrame(file)
  refuseUnsupported(frame, false)
  const declaration = atOnce(declarationOf(frame, presets))
  return values.json ? JSON.stringify(jsonOf(declaration), null, 2) : textOf(declaration, width)
}

/** Reads the file as an `open` frame through the reader of the wire, so that its errors are those of a stream. */
function readOpenFrame(file: string): OpenFrame {
  const given = { type: 'open', protocol: 1, run: 'explained', ...parseFile(file) } as const
  if (given.type !== 'open') throw new ConfigError(`${file} has type ${show(given.type)}, expected 'open'`)
  const frame = decodeClientFrame(encodeFrame(given), { chunk_bytes: OPEN_BYTES })
  assert(frame.type === 'open')
  return frame
}

function parseFile(file: string): object {
  try {
    const given: unknown = JSON.parse(readFileSync(file, 'utf8'))
    if (typeof given === 'object' && given !== null && !Array.isArray(given)) return given
  } catch (error) {
    throw new ConfigError(`${file} cannot be read: ${errorText(error)}`)
  }
  throw new ConfigError(`${file} is no object, expected one with groups and parameters`)
}

function rowsOf({ groups, parameters }: Declaration): Row[] {
  return parameters.map((parameter) => {
    const group = groupOf(parameter, groups)
    return { parameter, group, plan: explain(parameter, group) }
  })
}

function totalsOf(rows: readonly Row[]): Totals {
  const sum = (of: (row: Row) => number) => rows.reduce((total, row) => total + of(row), 0)
  return {
    parameters: rows.length,
    elements: sum(({ parameter }) => parameter.elements),
    state_bytes: sum(({ plan }) => plan.state_bytes),
    flops: sum(({ plan }) => plan.flops),
  }
}

function jsonOf(declaration: Declaration): object {
  const rows = rowsOf(declaration)
  return {
    groups: Object.fromEntries([...declaration.groups].map(([name, group]) => [name, effective(group)])),
    parameters: rows.map(({ parameter, group, plan }) => ({
      ...describe(parameter),
      algorithm: group.algorithm,
      layout: layoutName(parameter),
      plan,
    })),
    attentions: declaration.attentions,
    totals: totalsOf(rows),
  }
}

function textOf(declaration: Declaration, width?: number): string {
  const rows = rowsOf(declaration)
  const used = [...declaration.groups.values()].filter(({ name }) => rows.some(({ group }) => group.name === name))
  const sections = used.map((group) =>
    sectionOf(
      group,
      rows.filter((row) => row.group === group),
      width,
    ),
  )
  const { parameters, elements, state_bytes, flops } = totalsOf(rows)
  const counts = `${parameters} parameter${parameters === 1 ? '' : 's'}, ${amount(elements)} elements`
  const total = `in all: ${counts}, ${amount(state_bytes, 'B')} of state, ${amount(flops, 'FLOPs')} per step`
  const attentions = declaration.attentions.map((attention) => attentionLine(attention, declaration.parameters))
  return [...sections, ...(attentions.length > 0 ? [attentions.join('\n')] : []), total].join('\n\n')
}

/** The lines of an attention: which rows QK-clip scales where a head's largest logit is above the threshold. */
function attentionLine(attention: Attention, parameters: readonly Parameter[]): string {
  const { name, rule, query_heads, threshold } = attention
  const rows = claimsOf(attention).map(({ key, parameter, first_row, rows }) => {
    return `  ${key}: rows ${first_row} to ${first_row + rows - 1} of ${parameters[parameter].name}`
  })
  return [`attention ${name}: ${rule} of ${query_heads} heads, clipped at ${threshold}`, ...rows].join('\n')
}

const HEAD = ['parameter', 'layout', 'matrices', 'f', 'state', 'FLOPs']
const ALIGN = ['left', 'left', 'right', 'right', 'right', 'right'] as const

/** A group's title, the table of its parameters, and a line for each layout that says what it means. */
function sectionOf(group: Group, rows: readonly Row[], width?: number): string {
  const table = tableLines({ head: HEAD, align: ALIGN, rows: rows.flatMap(cellsOf) }, width)
  const reasons = new Map(rows.map(({ parameter }) => [layoutName(parameter), layoutReason(parameter)]))
  const why = [...reasons].map(([layout, reason]) => `${layout}: ${reason}`)
  return [titleOf(group, rows[0].plan), ...table, ...why].join('\n')
}

function titleOf({ name, algorithm, preset, hyperparameters: { lr } }: Group, { decay }: Explanation): string {
  const from = preset === undefined ? '' : ` from preset ${preset}`
  return `group ${name}: ${algorithm}${from}, lr ${lr}, decay ${decimal(decay)} per step`
}

/** A parameter's row of the table; blocks of further sizes have rows of their own below it. */
function cellsOf({ parameter, plan: { blocks, state_bytes, flops } }: Row): string[][] {
  const [first, ...others] = blocks.map(({ count, rows, cols, factor }) => [
    `${count === 1 ? '' : `${count} of `}${rows}x${cols}`,
    decimal(factor),
  ])
  const elements = [parameter.shape.join('x') || 'scalar', '']
  const line = [parameter.name, layoutName(parameter), ...(first ?? elements), amount(state_bytes, 'B'), amount(flops)]
  return [line, ...others.map((block) => ['', '', ...block, '', ''])]
}
