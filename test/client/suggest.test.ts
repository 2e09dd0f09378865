import t, { type Test } from 'tap'
import { connect, type Described, type SuggestOptions, suggest } from '../../src/client/client.js'
import { CONVNET, GPT2, KIMI, LLAMA } from './models.js'
import { startService } from './service.js'

/** The names with a reason, numbers of layers left out, each once. */
function withReason(parameters: readonly Described[], options: SuggestOptions = {}): Record<string, string[]> {
  const { reasons } = suggest(parameters, options)
  const names: Record<string, Set<string>> = {}
  for (const [i, { name }] of parameters.entries()) {
    names[reasons[i]!] ??= new Set()
    names[reasons[i]!]!.add(name.replace(/\.\d+(?=\.)/g, '').replace(/^.*layers\./, ''))
  }
  return Object.fromEntries(Object.entries(names).map(([why, set]) => [why, [...set]]))
}

/** Muon's names are exactly those of the given reasons. */
function muonHas(t: Test, parameters: readonly Described[], reasons: readonly string[]): void {
  const suggestion = suggest(parameters)
  const muon = suggestion.parameters.flatMap(({ group }, i) => (group === 'muon' ? [suggestion.reasons[i]!] : []))
  t.same(new Set(muon), new Set(reasons))
}

t.test('GPT-2: Muon has the four matrices of each layer', async (t) => {
  t.same(withReason(GPT2), {
    embedding: ['wte.weight', 'wpe.weight'],
    norm: ['h.ln_1.weight', 'h.ln_2.weight', 'ln_f.weight'],
    bias: [
      'h.ln_1.bias',
      'h.attn.c_attn.bias',
      'h.attn.c_proj.bias',
      'h.ln_2.bias',
      'h.mlp.c_fc.bias',
      'h.mlp.c_proj.bias',
      'ln_f.bias',
    ],
    matrix: ['h.attn.c_attn.weight', 'h.attn.c_proj.weight', 'h.mlp.c_fc.weight', 'h.mlp.c_proj.weight'],
  })
  muonHas(t, GPT2, ['matrix'])
})

t.test('Llama: Muon has every projection, AdamW the embedding, the head and the norms', async (t) => {
  t.same(withReason(LLAMA), {
    embedding: ['model.embed_tokens.weight'],
    matrix: [
      'self_attn.q_proj.weight',
      'self_attn.k_proj.weight',
      'self_attn.v_proj.weight',
      'self_attn.o_proj.weight',
      'mlp.gate_proj.weight',
      'mlp.up_proj.weight',
      'mlp.down_proj.weight',
    ],
    norm: ['input_layernorm.weight', 'post_attention_layernorm.weight', 'model.norm.weight'],
    head: ['lm_head.weight'],
  })
  muonHas(t, LLAMA, ['matrix'])
})

t.test(
  'Kimi K2: stacked experts are a batch of matrices, the router and the latent projections are matrices',
  async (t) => {
    const { parameters, groups } = suggest(KIMI, { preset: 'kimi-k2' })
    muonHas(t, KIMI, ['matrix', 'experts'])
    t.same(groups, [
      { preset: 'kimi-k2', name: 'muon' },
      { preset: 'kimi-k2', algorithm: 'adamw', name: 'adamw' },
    ])
    const batched = parameters.filter(({ matrices }) => matrices === 'batch').map(({ name }) => name)
    t.same(
      batched,
      ['gate', 'up', 'down'].map((name) => `model.layers.1.mlp.experts.${name}_proj.weight`),
    )
    const groupOf = (name: string) => parameters.find((parameter) => parameter.name.endsWith(name))?.group
    t.equal(groupOf('kv_a_proj_with_mqa.weight'), 'muon')
    t.equal(groupOf('mlp.gate.weight'), 'muon')
    t.equal(groupOf('e_score_correction_bias'), 'adamw')
    t.equal(groupOf('kv_a_layernorm.weight'), 'adamw')
  },
)

t.test('a convolutional network: all but the first convolution are flattened for Muon', async (t) => {
  t.same(withReason(CONVNET), {
    'first convolution': ['conv1.weight'],
    norm: ['bn1.weight', 'layer1.bn1.weight'],
    bias: ['bn1.bias', 'layer1.downsample.bias', 'fc.bias'],
    convolution: ['layer1.conv1.weight', 'layer1.conv2.weight', 'layer1.downsample.weight'],
    matrix: ['classify.hidden.weight'],
    head: ['fc.weight'],
  })
  const { parameters } = suggest(CONVNET)
  for (const { group, shape, matrices } of parameters)
    t.equal(matrices, group === 'muon' && shape.length > 2 ? 'flatten' : undefined)
})

t.test(
  'a model that begins with a convolution reads its input there, if that has the channels of a picture',
  async (t) => {
    const cases: [channels: number, why: string][] = [
      [1, 'first convolution'],
      [4, 'first convolution'],
      [5, 'convolution'],
    ]
    for (const [channels, why] of cases) {
      const model = [{ name: 'w', shape: [64, channels, 3, 3] }]
      t.same(suggest(model).reasons, [why], `${channels} channels`)
      t.same(suggest([{ name: 'first', shape: [8, 8] }, ...model]).reasons, ['matrix', 'convolution'])
    }
  },
)

t.test('what has no telling name goes by its shape', async (t) => {
  const cases: [shape: number[], group: string, matrices: string | undefined, why: string][] = [
    [[], 'adamw', undefined, 'below rank 2'],
    [[8], 'adamw', undefined, 'below rank 2'],
    [[1, 8, 1], 'adamw', undefined, 'below rank 2'],
    [[8, 8], 'muon', undefined, 'matrix'],
    [[64, 32, 5], 'muon', 'flatten', 'convolution'],
    [[64, 1, 4], 'muon', 'flatten', 'convolution'],
    [[4, 64, 64], 'muon', 'batch', 'matrices side by side'],
    [[2, 4, 64, 16], 'muon', 'batch', 'matrices side by side'],
  ]
  for (const [shape, group, matrices, why] of cases) {
    const { parameters, reasons } = suggest([
      { name: 'first', shape: [4, 4] },
      { name: 'w', shape },
    ])
    t.match([parameters[1]!.group, parameters[1]!.matrices, reasons[1]], [group, matrices, why], `[${shape}]`)
  }
})

t.test('names are told apart by whole words', async (t) => {
  const cases: [name: string, why: string][] = [
    ['encoder.layer.0.attention.output.dense.weight', 'matrix'],
    ['output.weight', 'head'],
    ['model.decoder.layers.0.fc1.weight', 'matrix'],
    ['h.0.mlp.c_fc.weight', 'matrix'],
    ['transformer.fc.weight', 'head'],
    ['heads.1.weight', 'head'],
    ['attn.head_mixer.weight', 'matrix'],
    ['tok_embeddings.weight', 'embedding'],
    ['embedder.weight', 'matrix'],
    ['blocks.0.norm1.weight', 'norm'],
    ['self_attn.q_layernorm.weight', 'norm'],
    ['normalizer.weight', 'matrix'],
    ['unbiased.weight', 'matrix'],
    ['tok_emb.weight', 'embedding'],
    ['token_embd.weight', 'embedding'],
    ['encoder.embed_positions.weight', 'embedding'],
    ['shared.weight', 'embedding'],
    ['mlp.shared.weight', 'matrix'],
    ['layer.0.SelfAttention.relative_attention_bias.weight', 'bias'],
    ['layers.0.blocks.0.attn.relative_position_bias_table', 'bias'],
    ['classifier.out_proj.weight', 'head'],
    ['classifier.dense.weight', 'matrix'],
    ['self_attn.out_proj.weight', 'matrix'],
    ['lm_head.decoder.weight', 'head'],
    ['cls.predictions.decoder.weight', 'head'],
    ['lm_head.dense.weight', 'matrix'],
    ['qa_outputs.weight', 'head'],
    ['proj_out.weight', 'head'],
    ['transformer_blocks.0.proj_out.weight', 'matrix'],
    ['output_projection.weight', 'head'],
    ['logits.weight', 'head'],
  ]
  for (const [name, why] of cases) t.same(suggest([{ name, shape: [8, 8] }]).reasons, [why], name)
})

t.test('rules of the caller come first, and a pattern with a memory decides the same each time', async (t) => {
  const rules = [
    { name: /router/g, route: 'adamw', why: 'router' },
    { name: /^wte/, route: 'muon', why: 'as I like' },
    { name: /stack/, route: 'muon', why: 'a stack', matrices: 'flatten' },
    { name: /pile/, route: 'muon', why: 'a pile' },
  ] as const
  const list = ['router', 'router', 'wte', 'stack', 'pile'].map((name, i) => ({
    name,
    shape: i < 3 ? [8, 8] : [4, 64, 64],
  }))
  const { parameters, reasons } = suggest(list, { rules })
  t.same(reasons, ['router', 'router', 'as I like', 'a stack', 'a pile'])
  t.same(
    parameters.map(({ group, matrices }) => [group, matrices]),
    [
      ['adamw', undefined],
      ['adamw', undefined],
      ['muon', undefined],
      ['muon', 'flatten'],
      ['muon', 'batch'],
    ],
  )
})

t.test('a layout that is given stays and means Muon', async (t) => {
  const list: Described[] = [
    { name: 'wte', shape: [8, 4], heads: 2 },
    { name: 'qkv', shape: [12, 4], split: [4, 4, 4] },
    { name: 'w', shape: [2, 4, 64, 64], matrices: 'batch' },
    { name: 'experts', shape: [2, 4, 4], heads: 2 },
  ]
  const { parameters, reasons, groups } = suggest(list)
  t.same(new Set(reasons), new Set(['layout as given']))
  t.same(parameters, [
    { ...list[0], group: 'muon' },
    { ...list[1], group: 'muon' },
    { ...list[2], group: 'muon' },
    { ...list[3], group: 'muon', matrices: 'batch' },
  ])
  t.same(groups, [{ algorithm: 'muon', name: 'muon' }], 'a group that nothing is in is left out')
})

t.test('keys for a group win over its preset, and its name stays', async (t) => {
  const options = { preset: 'moonlight', muon: { lr: 0.1, name: 'x' }, adamw: { algorithm: 'sgd' } }
  t.same(suggest(GPT2, options).groups, [
    { preset: 'moonlight', lr: 0.1, name: 'muon' },
    { preset: 'moonlight', algorithm: 'sgd', name: 'adamw' },
  ])
  t.same(suggest(GPT2, { muon: { lr: 0.1 } }).groups[0], { algorithm: 'muon', lr: 0.1, name: 'muon' })
})

t.test('the table has a line for each parameter, within the width', async (t) => {
  const lines = suggest(KIMI, { width: 72 }).table.split('\n')
  t.equal(lines.length, KIMI.length + 1)
  t.ok(lines.every((line) => line.length <= 72))
  t.match(lines[0], /^parameter +shape +group +matrices +why$/)
  t.match(
    lines.find((line) => line.includes('q_b_proj')),
    /^model\.la.*….*q_b_proj\.weight +12288x1536 +muon +matrix$/,
  )
  t.match(
    suggest(KIMI).table,
    /^model\.layers\.1\.mlp\.experts\.down_proj\.weight +384x7168x2048 +muon +batch +experts$/m,
  )
  t.match(suggest([{ name: 'scale', shape: [] }]).table, /^scale +scalar +adamw +below rank 2$/m)
})

t.test('the service takes what is suggested, with a preset and without', async (t) => {
  const service = await startService()
  const client = await connect(service.url)
  const small = CONVNET.map(({ name, shape }) => {
    return { name, shape, data: new Float32Array(shape.reduce((product, size) => product * size, 1)) }
  })
  for (const preset of [undefined, 'deepseek-v4']) {
    const { groups, parameters } = suggest(small, { preset })
    const run = await client.open({ run: `with-${preset}`, groups, parameters })
    t.equal(run.opened.parameters, undefined, 'the run has what was declared')
    t.same(
      service.runs.get(`with-${preset}`).parameters.map(({ group }) => group),
      parameters.map(({ group }) => group),
    )
    t.equal(run.opened.groups.muon?.preset, preset)
    const receipt = await run.step(small.map(({ data }) => data.slice().fill(0.5)))
    t.equal(receipt.applied, small.length)
  }
  await client.close()
  await service.app.close()
})
