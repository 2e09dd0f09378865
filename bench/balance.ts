import { tableLines } from '../src/text-table.js'
import { balanceOf, MODELS, UNEVEN } from '../test/cluster/models.js'

// How evenly parameters are shared out over shards: node dist/bench/balance.js. It measures no time: `cost` is that of
// src/cluster/placement.ts. Each figure is the largest shard over the mean of all; `least` is the largest parameter
// over that mean, below which no placement comes that leaves parameters whole.

const figure = (ratio: number) => (Number.isNaN(ratio) ? '' : ratio.toFixed(3))
const rows = [...MODELS, ...UNEVEN].flatMap((model) =>
  [2, 4, 8].flatMap((shards) => {
    if (model.parameters.length < shards) return []
    const { cost, least, state, flops } = balanceOf(model, shards)
    return [[model.name, `${shards}`, ...[cost, least, state, flops].map(figure)]]
  }),
)
const head = ['parameters of', 'shards', 'cost', 'least', 'state bytes', 'Newton–Schulz']
console.log(tableLines({ head, align: ['left', 'right', 'right', 'right', 'right', 'right'], rows }).join('\n'))
