import { join } from 'node:path'
import t, { type Test } from 'tap'
import { explainCommand } from '../../src/commands/explain.js'
import { RawClient, startService } from '../service.js'

const OPEN = {
  groups: [
    { name: 'hidden', preset: 'moonlight', lr: 0.001 },
    { name: 'rest', algorithm: 'adamw' },
    { name: 'unused', algorithm: 'sgd' },
  ],
  parameters: [
    { name: 'model.embed_tokens.weight', shape: [50304, 768], group: 'rest' },
    { name: 'model.layers.0.self_attn.qkv_proj.weight', shape: [1280, 768], group: 'hidden', split: [768, 256, 256] },
    { name: 'model.layers.0.self_attn.o_proj.weight', shape: [768, 768], group: 'hidden' },
    { name: 'model.layers.0.self_attn.rotary_embedding.frequency_scale', shape: [], group: 'rest' },
  ],
}

function fileOf(t: Test, content: unknown): string {
  const text = typeof content === 'string' ? content : JSON.stringify(content)
  return join(t.testdir({ 'open.json': text }), 'open.json')
}

t.test('the text has a table for each group that is used, its layouts, and the totals', async (t) => {
  const text = explainCommand([fileOf(t, OPEN)], {})
  t.equal(
    text,
    `group hidden: muon from preset moonlight, lr 0.001, decay 0.0001 per step
parameter                                 layout       matrices     f    state   FLOPs
model.layers.0.self_attn.qkv_proj.weight  split 3       768x768  5.54  3.93 MB    16 G
                                                   2 of 256x768  5.54
model.layers.0.self_attn.o_proj.weight    matrix        768x768  5.54  2.36 MB  13.6 G
split 3: its rows are 3 fused matrices
matrix: the tensor is one matrix

group rest: adamw, lr 0.001, decay 0.00001 per step
parameter                                                  layout     matrices  f   state  FLOPs
model.embed_tokens.weight                                  elements  50304x768     309 MB  464 M
model.layers.0.self_attn.rotary_embedding.frequency_scale  elements     scalar        8 B     12
elements: each element for itself

in all: 4 parameters, 40.2 M elements, 315 MB of state, 30 GFLOPs per step`,
  )
})

t.test('attentions are listed with the rows that QK-clip scales', async (t) => {
  const groups = [{ name: 'g', preset: 'kimi-k2' }]
  const parameters = ['q_b', 'kv_b'].map((name) => ({ name, shape: [12, 4], group: 'g' }))
  const heads = { rule: 'mla', query_heads: 2, nope_dim: 4, rope_dim: 2, value_dim: 1 }
  const attentions = [{ name: 'h.0', ...heads, query: { parameter: 0 }, key: { parameter: 1, first_row: 2 } }]
  const file = fileOf(t, { groups, parameters, attentions })
  t.match(
    explainCommand([file], {}),
    'attention h.0: mla of 2 heads, clipped at 100\n  query: rows 0 to 11 of q_b\n  key: rows 2 to 11 of kv_b\n\nin all: ',
  )
  t.match(JSON.parse(explainCommand([file, '--json'], {})).attentions, [
    { name: 'h.0', threshold: 100, key: { first_row: 2 } },
  ])
})

t.test('names are shortened where the screen is narrow', async (t) => {
  const lines = explainCommand([fileOf(t, OPEN)], {}, 80).split('\n')
  t.ok(lines.every((line) => line.length <= 80))
  t.match(lines[2], /^model\.laye.*….*qkv_proj\.weight {2}split 3 {7}768x768 /)
})

t.test('the facts as JSON are those that a run of the same open has', async (t) => {
  const small = OPEN.parameters.map(({ shape, split, ...rest }) => {
    const scaled = shape.map((size) => size / 256 || 1)
    return { ...rest, shape: scaled.map(Math.ceil), ...(split && { split: split.map((size) => size / 256) }) }
  })
  const open = { ...OPEN, parameters: small }
  const printed = JSON.parse(explainCommand([fileOf(t, open), '--json'], {}))
  const service = await startService({ lanes: 1 })
  const client = await RawClient.connect(service.url)
  const opened = await client.open({ run: 'r', ...open })
  t.same(printed.groups, opened.groups)
  const answer = await fetch(`${service.http}/v1/runs/r/parameters`)
  const { parameters } = (await answer.json()) as { parameters: Record<string, unknown>[] }
  for (const [i, { layout, ...explained }] of printed.parameters.entries()) {
    const { step, updates, state_bytes, ...row } = parameters[i]!
    t.same(explained, row)
    t.equal(layout, ['elements', 'split 3', 'matrix', 'elements'][i])
  }
  const sum = (key: string) =>
    printed.parameters.reduce((all: number, { plan }: { plan: Record<string, number> }) => all + plan[key], 0)
  t.same(printed.totals, {
    parameters: 4,
    elements: 197 * 3 + 15 + 9 + 1,
    state_bytes: sum('state_bytes'),
    flops: sum('flops'),
  })
  await client.close()
  await service.app.close()
})

t.test('it refuses what open refuses, in the same words', async (t) => {
  const cases: object[] = [
    { groups: OPEN.groups },
    { ...OPEN, groups: [...OPEN.groups, { name: 'rest', algorithm: 'sgd' }] },
    { ...OPEN, groups: [{ name: 'hidden', preset: 'kimi' }] },
    { ...OPEN, groups: [{ name: 'hidden', algorithm: 'muon', lrr: 1 }] },
    { ...OPEN, parameters: [{ name: 'w', shape: [4], group: 'hidden' }] },
    { ...OPEN, parameters: [{ name: 'w', shape: [4, 4], group: 'hidden', heads: 3 }] },
    { ...OPEN, parameters: [] },
    {
      ...OPEN,
      attentions: [{ name: 'a', query_heads: 1, query: { parameter: 9 }, key: { parameter: 2 }, head_dim: 2 }],
    },
    { ...OPEN, checkpoint: 'last' },
    { ...OPEN, protocol: 2 },
  ]
  const service = await startService({ lanes: 1 })
  for (const open of cases) {
    const client = await RawClient.connect(service.url)
    client.send({ type: 'open', protocol: 1, run: 'explained', ...open })
    const { code, message } = await client.expect('error')
    t.throws(() => explainCommand([fileOf(t, open)], {}), { code, message }, message)
    await client.close()
  }
  await service.app.close()
})

t.test('keys that no open frame has are refused with their path', async (t) => {
  const cases: [object, RegExp][] = [
    [{ ...OPEN, colour: 1 }, /^open\.colour is unknown$/],
    [{ ...OPEN, parameters: [{ name: 'w', group: 'g' }] }, /^open\.parameters\[0\]\.shape is missing$/],
    [
      { ...OPEN, parameters: [{ name: 'w', group: 'g', shape: [1.5] }] },
      /^open\.parameters\[0\]\.shape\[0\] is a float/,
    ],
    [{ ...OPEN, groups: [{ name: null }] }, /^open\.groups\[0\]\.name is a nil, expected a string; leave the key out/],
  ]
  for (const [open, message] of cases) {
    t.throws(() => explainCommand([fileOf(t, open)], {}), { code: 'FRAME_MALFORMED', message }, String(message))
  }
})

t.test('a file that is no open frame, and wrong arguments, are one line', async (t) => {
  const file = fileOf(t, OPEN)
  const cases: [string[], RegExp][] = [
    [[], /^explain takes one file \(--help says what is in it\)$/],
    [[file, file], /^explain takes one file/],
    [[file, '--yaml'], /^Unknown option '--yaml'/],
    [['/nowhere.json'], /^\/nowhere\.json cannot be read: ENOENT/],
  ]
  const contents: [unknown, RegExp][] = [
    ['{"groups"', /open\.json cannot be read: [^\n]+$/],
    ['[]', /open\.json is no object, expected one with groups and parameters$/],
    ['null', /open\.json is no object/],
    [{ type: 'end', step: 1 }, /open\.json has type 'end', expected 'open'$/],
  ]
  for (const [argv, message] of cases)
    t.match(
      thrown(() => explainCommand(argv, {})),
      { name: 'ConfigError', message },
    )
  for (const [content, message] of contents) {
    const argv = [fileOf(t, content)]
    t.match(
      thrown(() => explainCommand(argv, {})),
      { name: 'ConfigError', message },
    )
  }
})

t.test('presets of a folder can be named', async (t) => {
  const mine = 'description: mine\nalgorithm: sgd\nhyperparameters: { sgd: { lr: 0.7 } }\n'
  const open = { groups: [{ name: 'g', preset: 'mine' }], parameters: [{ name: 'w', shape: [9], group: 'g' }] }
  const folder = t.testdir({ presets: { 'mine.yaml': mine }, 'open.json': JSON.stringify(open) })
  const [file, presets] = [join(folder, 'open.json'), join(folder, 'presets')]
  const title = 'group g: sgd from preset mine, lr 0.7, decay 0 per step'
  t.match(explainCommand([file, '--presets', presets], { MUOND_PRESETS: '/nowhere' }), title)
  t.match(explainCommand([file], { MUOND_PRESETS: presets }), title)
  t.match(explainCommand([file, '--presets', presets], {}), 'in all: 1 parameter, 9 elements, ')
  t.throws(() => explainCommand([file], {}), { message: /preset is 'mine', expected one of deepseek-v4, / })
})

t.test('--help says how it is used, within 80 columns', async (t) => {
  const help = explainCommand(['--help'], {})
  t.match(help, /^muond explain PARAMETERS\.json/)
  t.ok(help.split('\n').every((line) => line.length <= 80))
})

function thrown(work: () => unknown): Error {
  try {
    work()
  } catch (error) {
    if (error instanceof Error) return error
  }
  throw new Error('nothing was thrown')
}
