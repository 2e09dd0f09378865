import { GPT2, transformer } from '../../bench/models.js'
import { newtonSchulzFlops } from '../../kernels/flops.js'
import { parameterCost, placeShards } from '../../src/cluster/placement.js'
import { type Attention, parseAttentions } from '../../src/optimizer/attention.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { type Parameter, parseParameters, stateBytes } from '../../src/optimizer/parameter.js'
import type { AttentionDeclaration, ParameterDeclaration } from '../../src/wire/frame.js'
import { LLAMA } from '../client/models.js'

/** A model's parameters, and the attentions whose parameters have to stay together. */
export type Model = {
  readonly name: string
  readonly parameters: readonly Parameter[]
  readonly attentions: readonly Attention[]
}

const GROUPS = new Map(
  ['muon', 'adamw'].map((algorithm) => [algorithm, parseGroup({ name: algorithm, algorithm })] as const),
)

export function modelOf(
  name: string,
  given: readonly ParameterDeclaration[],
  attentions: readonly AttentionDeclaration[] = [],
): Model {
  const parameters = parseParameters(given, GROUPS)
  return { name, parameters, attentions: parseAttentions(attentions, parameters) }
}

const isMatrix = (name: string, shape: readonly number[]) => shape.length > 1 && !/embed|lm_head/.test(name)

const llama: ParameterDeclaration[] = LLAMA.map(({ name, shape }) => {
  return { name, shape, group: isMatrix(name, shape) ? 'muon' : 'adamw' }
})

/** The queries and keys of each layer, as QK-clip has them. */
const llamaAttentions = (parameters: readonly ParameterDeclaration[]): AttentionDeclaration[] =>
  parameters.flatMap(({ name }, query) => {
    if (!name.endsWith('q_proj.weight')) return []
    const [query_heads, key_value_heads, head_dim] = [32, 8, 64]
    const rows = { query: { parameter: query }, key: { parameter: query + 1 } }
    return [{ name, rule: 'gqa', query_heads, key_value_heads, head_dim, ...rows }]
  })

const EXPERTS = 48
const WIDTH = 2048
const HIDDEN = 7168

/** Eight layers of attention and 48 experts; `experts` declares the matrices of one kind in a layer. */
function expertLayers(experts: (name: string, shape: readonly [number, number]) => ParameterDeclaration[]) {
  const matrix = (name: string, shape: readonly number[]) => ({ name, shape, group: 'muon' })
  return Array.from({ length: 8 }, (_, layer) => [
    ...['q', 'k', 'v', 'o'].map((side) => matrix(`${layer}.${side}`, [WIDTH, WIDTH])),
    { name: `${layer}.norm`, shape: [WIDTH], group: 'adamw' },
    matrix(`${layer}.router`, [EXPERTS, WIDTH]),
    ...experts(`${layer}.gate`, [HIDDEN, WIDTH]),
    ...experts(`${layer}.up`, [HIDDEN, WIDTH]),
    ...experts(`${layer}.down`, [WIDTH, HIDDEN]),
  ]).flat()
}

const stacked = (name: string, shape: readonly [number, number]): ParameterDeclaration[] => {
  return [{ name, shape: [EXPERTS, ...shape], group: 'muon', matrices: 'batch' }]
}
const apart = (name: string, shape: readonly [number, number]): ParameterDeclaration[] =>
  Array.from({ length: EXPERTS }, (_, expert) => ({ name: `${name}.${expert}`, shape, group: 'muon' }))

export const MODELS: readonly Model[] = [
  modelOf('GPT-2 124M, tied head', transformer(GPT2, { hidden: 'muon', rest: 'adamw' }).parameters),
  modelOf('Llama-1B, QK-clip', llama, llamaAttentions(llama)),
  modelOf(
    'Llama-1B, tied head',
    llama.filter(({ name }) => name !== 'lm_head.weight'),
  ),
  modelOf('48 experts, 8 layers, stacked', expertLayers(stacked)),
  modelOf('48 experts, 8 layers, each its own parameter', expertLayers(apart)),
]

/** Models that cannot be shared out evenly as they are: most of what they cost is one parameter, or a few. */
export const UNEVEN: readonly Model[] = [
  modelOf('GPT-2 124M, AdamW alone', transformer(GPT2, { hidden: 'adamw', rest: 'adamw' }).parameters),
  modelOf('48 experts, one stack of one layer', stacked('experts', [WIDTH, HIDDEN])),
  modelOf('48 experts, one stack and a norm', [
    ...stacked('experts', [WIDTH, HIDDEN]),
    ...Array.from({ length: 8 }, (_, i) => ({ name: `norm.${i}`, shape: [WIDTH], group: 'adamw' })),
  ]),
]

/**
 * The largest shard over the mean of all, by what is counted; `least` is where no placement that leaves parameters
 * whole comes below by cost: the largest parameter over the mean of all shards, or 1.
 */
export type Balance = Readonly<Record<'cost' | 'state' | 'flops' | 'least', number>>

export function balanceOf({ parameters, attentions }: Model, shards: number): Balance {
  const placed = placeShards(parameters, attentions, shards)
  const by = (count: (parameter: Parameter) => number) => {
    const loads = placed.map((indices) => indices.reduce((sum, index) => sum + count(parameters[index]!), 0))
    return (Math.max(...loads) * shards) / loads.reduce((sum, load) => sum + load, 0)
  }
  const costs = parameters.map(parameterCost)
  const least = (Math.max(...costs) * shards) / costs.reduce((sum, cost) => sum + cost, 0)
  return { cost: by(parameterCost), state: by(stateBytes), flops: by(newtonSchulz), least: Math.max(1, least) }
}

/** Operations of five iterations. */
function newtonSchulz({ blocks }: Parameter): number {
  const five = Array.from({ length: 5 }, () => [1, 1, 1] as const)
  return blocks.reduce((sum, { rows, cols }) => sum + newtonSchulzFlops(five, [rows, cols]), 0)
}
