import { tableLines } from '../text-table.js'
import type { GroupDeclaration } from '../wire/frame.js'
import { type Described, NAME_RULES, type NameRule, type Routed, routeAll } from './routing.js'

export type SuggestOptions = {
  /** Looked at before `NAME_RULES`; the first that matches decides. */
  rules?: readonly NameRule[]
  /** A preset for both groups: Muon's as it names it, and AdamW's values. */
  preset?: string
  /** Keys of Muon's group, such as `lr`; they win over the preset. */
  muon?: Partial<GroupDeclaration>
  /** Keys of AdamW's group. */
  adamw?: Partial<GroupDeclaration>
  /** Most characters of a line of `table`; without it every name stays whole. */
  width?: number
}

/** A parameter as it came, with its group and, where Muon needs one, its layout. */
export type Suggested<P extends Described> = Omit<P, 'matrices'> & { group: string; matrices?: string }

/**
 * `groups` and `parameters` as `open` takes them, `reasons` in the order of the parameters, and all of it as a table.
 */
export type Suggestion<P extends Described> = {
  groups: GroupDeclaration[]
  parameters: Suggested<P>[]
  reasons: string[]
  table: string
}

/**
 * Shares parameters out: embeddings, heads, norms, biases and anything below rank 2 to AdamW, everything else to Muon
 * (docs/algorithms.md, "Who gets Muon"). It decides by name and shape, so look at `table`, and overrule it with
 * `rules`.
 */
export function suggest<P extends Described>(parameters: readonly P[], options: SuggestOptions = {}): Suggestion<P> {
  const routed = routeAll(parameters, [...(options.rules ?? []), ...NAME_RULES])
  const groups = groupsOf(options).filter(({ name }) => routed.some(({ route }) => route === name))
  return {
    groups,
    parameters: parameters.map((parameter, i) => withGroup(parameter, routed[i])),
    reasons: routed.map(({ why }) => why),
    table: tableOf(parameters, routed, options.width),
  }
}

function groupsOf({ preset, muon, adamw }: SuggestOptions): GroupDeclaration[] {
  if (preset === undefined) {
    return [
      { algorithm: 'muon', ...muon, name: 'muon' },
      { algorithm: 'adamw', ...adamw, name: 'adamw' },
    ]
  }
  return [
    { preset, ...muon, name: 'muon' },
    { preset, algorithm: 'adamw', ...adamw, name: 'adamw' },
  ]
}

function withGroup<P extends Described>(parameter: P, { route, matrices }: Routed): Suggested<P> {
  return { ...parameter, group: route, ...(matrices === undefined ? {} : { matrices }) }
}

function tableOf(parameters: readonly Described[], routed: readonly Routed[], width?: number): string {
  const rows = parameters.map(({ name, shape }, i) => {
    const { route, matrices, why } = routed[i]
    return [name, shape.join('x') || 'scalar', route, matrices ?? '', why]
  })
  const head = ['parameter', 'shape', 'group', 'matrices', 'why']
  const align = ['left', 'right', 'left', 'left', 'left'] as const
  return tableLines({ head, align, rows }, width).join('\n')
}
