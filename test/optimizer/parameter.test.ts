import fc from 'fast-check'
import t from 'tap'
import { DTYPES } from '../../kernels/dtype.js'
import { ServiceError } from '../../src/errors.js'
import { type Group, parseGroup } from '../../src/optimizer/hyperparameters.js'
import {
  describe,
  findingDifference,
  MAX_BLOCKS,
  type Parameter,
  parseParameters,
  stateBytes,
} from '../../src/optimizer/parameter.js'
import { atOnce } from '../../src/wire/at-once.js'
import type { ParameterDeclaration } from '../../src/wire/frame.js'

const GROUPS: ReadonlyMap<string, Group> = new Map(
  ['muon', 'adamw', 'sgd'].map((algorithm) => [algorithm, parseGroup({ name: algorithm, algorithm })]),
)

const raw = (changes: Partial<ParameterDeclaration>): ParameterDeclaration => ({
  name: 'w',
  shape: [6, 4],
  group: 'muon',
  ...changes,
})
const one = (changes: Partial<ParameterDeclaration>): Parameter => parseParameters([raw(changes)], GROUPS)[0]
const blocks = (changes: Partial<ParameterDeclaration>) =>
  one(changes).blocks.map(({ rows, cols, offset }) => [rows, cols, offset])

function refusal(given: readonly ParameterDeclaration[]): ServiceError | undefined {
  try {
    parseParameters(given, GROUPS)
    return undefined
  } catch (error) {
    if (error instanceof ServiceError) return error
    throw error
  }
}

t.test('a parameter knows its sizes and its state', async (t) => {
  t.same(one({ gradient_dtype: 'bfloat16' }), {
    index: 0,
    name: 'w',
    shape: [6, 4],
    group: 'muon',
    gradient_dtype: 'bfloat16',
    update_dtype: 'float32',
    kernel_dtypes: { gradient_dtype: 'bfloat16', update_dtype: 'float32' },
    elements: 24,
    gradient_bytes: 48,
    update_bytes: 96,
    blocks: [{ rows: 6, cols: 4, offset: 0 }],
    state: [{ name: 'momentum_buffer', dtype: 'float32', shape: [6, 4], bytes: 96 }],
  })
  t.match(one({ gradient_dtype: 'int4_block64', update_dtype: 'int8_block256' }), {
    kernel_dtypes: { gradient_dtype: 'float32', update_dtype: 'float32' },
    gradient_bytes: 2 + 12,
    update_bytes: 2 + 24,
  })
  const scalar = one({ shape: [], group: 'adamw', update_dtype: 'float16' })
  t.match(scalar, { elements: 1, gradient_bytes: 4, update_bytes: 2, blocks: [] })
  t.same(scalar.state, [
    { name: 'exp_avg', dtype: 'float32', shape: [], bytes: 4 },
    { name: 'exp_avg_sq', dtype: 'float32', shape: [], bytes: 4 },
  ])
  t.equal(stateBytes(scalar), 8)
  t.equal(stateBytes(one({ group: 'sgd', shape: [3, 1, 2, 5] })), 120)
  for (const dtype of Object.keys(DTYPES))
    t.match(one({ gradient_dtype: dtype }), { gradient_dtype: dtype, update_dtype: 'float32' })
})

t.test('the hyperparameters say which state there is, in which type', async (t) => {
  const stateOf = (algorithm: string, options: object, shape: number[] = [6, 4]) => {
    const group = parseGroup({ name: 'g', algorithm, ...options })
    const [parameter] = parseParameters([{ name: 'w', shape, group: 'g' }], new Map([['g', group]]))
    return parameter.state.map(({ name, dtype, bytes }) => `${name} ${dtype} ${bytes}`)
  }
  t.same(stateOf('muon', { momentum_dtype: 'bfloat16' }), ['momentum_buffer bfloat16 48'])
  t.same(stateOf('muon', { second_momentum: 'normuon' }), ['momentum_buffer float32 96', 'second_momentum float32 24'])
  t.same(stateOf('adam', {}, [5]), ['exp_avg float32 20', 'exp_avg_sq float32 20'])
  for (const algorithm of ['adam', 'adamw']) {
    const expected = ['exp_avg float32 20', 'exp_avg_sq float32 20', 'max_exp_avg_sq float32 20']
    t.same(stateOf(algorithm, { amsgrad: true }, [5]), expected)
  }
  t.same(stateOf('rmsprop', {}, [5]), ['square_avg float32 20', 'momentum_buffer float32 20'])
})

t.test('the second momentum has a number for each line of the longer side of each matrix', async (t) => {
  const group = parseGroup({ name: 'g', algorithm: 'muon', second_momentum: 'normuon' })
  const cases: [Partial<ParameterDeclaration>, number[]][] = [
    [{ shape: [6, 4] }, [6, 1]],
    [{ shape: [4, 6] }, [1, 6]],
    [{ shape: [5, 5] }, [5, 1]],
    [{ shape: [1, 7] }, [1, 7]],
    [{ shape: [7, 1] }, [7, 1]],
    [{ shape: [2, 3, 5], matrices: 'flatten' }, [1, 15]],
    [{ shape: [3, 4, 6], matrices: 'batch' }, [3, 1, 6]],
    [{ shape: [1, 4, 6], matrices: 'batch' }, [1, 6]],
    [{ shape: [2, 3, 6, 4], matrices: 'batch' }, [6, 6, 1]],
    [{ shape: [6, 4], heads: 3 }, [3, 1, 4]],
    [{ shape: [12, 4], heads: 2 }, [2, 6, 1]],
    [{ shape: [12, 4], split: [6, 6] }, [2, 6, 1]],
    [{ shape: [12, 4], split: [9, 3] }, [13]],
    [{ shape: [2, 12, 4], matrices: 'batch', split: [9, 3] }, [26]],
  ]
  for (const [declared, shape] of cases) {
    const raw = { name: 'w', shape: [], group: 'g', ...declared }
    const [{ state }] = parseParameters([raw], new Map([['g', group]]))
    const bytes = 4 * shape.reduce((product, size) => product * size, 1)
    t.same(state[1], { name: 'second_momentum', dtype: 'float32', shape, bytes }, JSON.stringify(declared))
  }
})

t.test('the layout says which matrices a parameter has', async (t) => {
  const cases: [Partial<ParameterDeclaration>, number[][]][] = [
    [{}, [[6, 4, 0]]],
    [{ shape: [1, 1] }, [[1, 1, 0]]],
    [
      { split: [1, 2, 3] },
      [
        [1, 4, 0],
        [2, 4, 4],
        [3, 4, 12],
      ],
    ],
    [{ split: [6] }, [[6, 4, 0]]],
    [
      { heads: 3 },
      [
        [2, 4, 0],
        [2, 4, 8],
        [2, 4, 16],
      ],
    ],
    [{ heads: 1 }, [[6, 4, 0]]],
    [{ matrices: 'flatten' }, [[6, 4, 0]]],
    [{ matrices: 'batch' }, [[6, 4, 0]]],
    [{ shape: [8, 3, 5, 5], matrices: 'flatten' }, [[8, 75, 0]]],
    [
      { shape: [8, 3, 5, 5], matrices: 'flatten', split: [2, 6] },
      [
        [2, 75, 0],
        [6, 75, 150],
      ],
    ],
    [
      { shape: [2, 4, 3], matrices: 'batch' },
      [
        [4, 3, 0],
        [4, 3, 12],
      ],
    ],
    [
      { shape: [2, 1, 4, 3], matrices: 'batch', split: [3, 1] },
      [
        [3, 3, 0],
        [1, 3, 9],
        [3, 3, 12],
        [1, 3, 21],
      ],
    ],
    [
      { shape: [2, 4, 3], matrices: 'batch', heads: 2 },
      [
        [2, 3, 0],
        [2, 3, 6],
        [2, 3, 12],
        [2, 3, 18],
      ],
    ],
  ]
  for (const [changes, expected] of cases) t.same(blocks(changes), expected, JSON.stringify(changes))
})

const layouts = fc
  .record({
    batch: fc.array(fc.integer({ min: 1, max: 4 }), { maxLength: 2 }),
    heights: fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 4 }),
    heads: fc.integer({ min: 1, max: 4 }),
    cols: fc.integer({ min: 1, max: 6 }),
    cut: fc.constantFrom('none', 'split', 'heads'),
  })
  .map(({ batch, heights, heads, cols, cut }) => {
    const sum = heights.reduce((a, b) => a + b, 0)
    const rows = cut === 'heads' ? sum * heads : sum
    const layout = cut === 'split' ? { split: heights } : cut === 'heads' ? { heads } : {}
    return raw({ shape: [...batch, rows, cols], ...(batch.length > 0 ? { matrices: 'batch' } : {}), ...layout })
  })

t.test('the blocks tile the parameter: each element is in exactly one, in order', async () => {
  fc.assert(
    fc.property(layouts, (given) => {
      const parameter = one(given)
      let end = 0
      for (const { rows, cols, offset } of parameter.blocks) {
        if (offset !== end || rows < 1 || cols < 1) return false
        end += rows * cols
      }
      return end === parameter.elements
    }),
    { seed: 5, numRuns: 300 },
  )
})

const HUGE = 2 ** 30
const INVALID: [string, Partial<ParameterDeclaration>, string][] = [
  ['no name', { name: '' }, 'has 0 characters'],
  ['an overlong name', { name: 'x'.repeat(1025) }, 'has 1025 characters'],
  ['an unknown group', { group: 'other' }, `group 'other', expected one of [ 'muon', 'adamw', 'sgd' ]`],
  ['a group named as a property of objects', { group: '__proto__' }, `group '__proto__'`],
  ['a 0 in its shape', { shape: [6, 0] }, 'has 0 in its shape [ 6, 0 ]'],
  ['a negative size', { shape: [-1, -1] }, 'has -1 in its shape'],
  ['a fraction of a size', { shape: [1.5, 2] }, 'has 1.5 in its shape'],
  ['NaN in its shape', { shape: [Number.NaN, 2] }, 'has NaN in its shape'],
  ['a size above 2^53', { shape: [2 ** 53, 1] }, 'in its shape'],
  ['more elements than 2^49', { shape: [HUGE, HUGE], group: 'adamw' }, 'expected at most 562949953421312'],
  ['more elements than a double holds', { shape: Array(64).fill(HUGE) }, 'Infinity elements'],
  ['more dimensions than torch has', { shape: Array(65).fill(1) }, 'has 65 dimensions, expected at most 64'],
  ['rank 0 with muon', { shape: [] }, 'put it in a group with adamw'],
  ['rank 1 with muon', { shape: [4] }, 'put it in a group with adamw'],
  ['rank 3 without matrices', { shape: [2, 3, 4] }, `matrices 'flatten' or 'batch'`],
  ['unknown matrices', { shape: [2, 3, 4], matrices: 'stack' }, `'stack', expected 'flatten' or 'batch'`],
  ['split and heads', { split: [6], heads: 1 }, 'both split and heads'],
  ['an empty split and heads', { split: [], heads: 1 }, 'both split and heads'],
  ['split below its rows', { split: [2, 3] }, 'sums to 5, expected its 6 rows'],
  ['split above its rows', { split: [4, 4] }, 'sums to 8, expected its 6 rows'],
  ['an empty split', { split: [] }, 'sums to 0'],
  ['a 0 in its split', { split: [6, 0] }, 'has 0 in its split'],
  ['a negative split', { split: [7, -1] }, 'has -1 in its split'],
  ['a fractional split', { split: [1.5, 4.5] }, 'has 1.5 in its split'],
  ['split of the whole batch', { shape: [2, 3, 4], matrices: 'batch', split: [6] }, 'expected its 3 rows'],
  ['heads that do not divide', { heads: 4 }, 'has heads 4, expected a divisor of its 6 rows'],
  ['no heads', { heads: 0 }, 'has heads 0'],
  ['negative heads', { heads: -2 }, 'has heads -2'],
  ['fractional heads', { heads: 1.5 }, 'has heads 1.5'],
  ['more heads than rows', { heads: 12 }, 'has heads 12'],
  ['a layout on adamw', { group: 'adamw', split: [6] }, 'has split, but adamw has no matrices'],
  ['heads on sgd', { group: 'sgd', heads: 2 }, 'has heads, but sgd has no matrices'],
  ['matrices on adamw', { group: 'adamw', matrices: 'batch' }, 'has matrices, but adamw'],
  [
    'a billion heads',
    { shape: [HUGE, 1], heads: HUGE },
    `1073741824 matrices, ${MAX_BLOCKS - 1} are left of ${MAX_BLOCKS}`,
  ],
  ['a billion matrices', { shape: [HUGE, 1, 1], matrices: 'batch' }, '1073741824 matrices'],
]

t.test('what does not fit is refused with the name, the index and both values', async (t) => {
  for (const [what, changes, text] of INVALID) {
    const error = refusal([raw({ name: 'first' }), raw(changes)])
    t.equal(error?.code, 'PARAMETER_INVALID', what)
    t.ok(error?.message.includes(text), `${what}: ${error?.message}`)
    if (changes.name === undefined) t.match(error, { fields: { parameter: 1 }, message: /^parameter 'w' / })
    t.ok((error?.message.length ?? 0) < 400)
  }
})

t.test('unknown dtypes are refused', async (t) => {
  for (const dtype of ['float64', 'Float32', '', 'int8', 'constructor', '__proto__']) {
    for (const key of ['gradient_dtype', 'update_dtype']) {
      const error = refusal([raw({ [key]: dtype })])
      t.equal(error?.code, 'DTYPE_UNSUPPORTED')
      t.ok(
        error?.message.includes(`${key} '${dtype}', expected one of float32, bfloat16, float16`),
        `${error?.message}`,
      )
    }
  }
})

t.test('a list of parameters is neither empty nor does it name one twice', async (t) => {
  t.match(refusal([]), { code: 'PARAMETER_INVALID', message: /no parameters/ })
  const error = refusal([raw({ name: 'a' }), raw({ name: 'b' }), raw({ name: 'a' })])
  t.match(error, {
    code: 'PARAMETER_INVALID',
    message: `parameter 'a' has the name of parameter 0`,
    fields: { parameter: 2 },
  })
})

t.test('the number of matrices is bounded over all parameters', async (t) => {
  const half = { shape: [MAX_BLOCKS / 2, 1], heads: MAX_BLOCKS / 2 }
  const fits = parseParameters([raw({ name: 'a', ...half }), raw({ name: 'b', ...half })], GROUPS)
  t.equal(
    fits.reduce((sum, parameter) => sum + parameter.blocks.length, 0),
    MAX_BLOCKS,
  )
  const error = refusal([raw({ name: 'a', ...half }), raw({ name: 'b', ...half }), raw({ name: 'c' })])
  t.match(error, { code: 'PARAMETER_INVALID', message: /'c' is cut into 1 matrices, 0 are left/ })
})

t.test('the row of a parameter has its layout keys inline and no others', async (t) => {
  const plain = {
    index: 0,
    name: 'w',
    shape: [6, 4],
    group: 'muon',
    gradient_dtype: 'float32',
    update_dtype: 'float32',
  }
  const cases: Partial<ParameterDeclaration>[] = [{}, { split: [2, 4] }, { heads: 2, matrices: 'flatten' }]
  for (const layout of cases) t.strictSame(describe(one(layout)), { ...plain, ...layout })
})

t.test('the first difference between two lists of parameters is named', async (t) => {
  const list = (...changes: Partial<ParameterDeclaration>[]) =>
    parseParameters(
      changes.map((change, i) => raw({ name: `p${i}`, ...change })),
      GROUPS,
    )
  const cases: [Parameter[], Parameter[], string | undefined][] = [
    [list({}, { heads: 2 }), list({}, { heads: 2 }), undefined],
    [list({}), list({ gradient_dtype: 'float32' }), undefined],
    [list({}), list({ name: 'q' }), `parameter 0 ('p0') has name 'p0' in the run, 'q' given`],
    [list({}, {}), list({}, { shape: [4, 6] }), `parameter 1 ('p1') has shape [ 6, 4 ] in the run, [ 4, 6 ] given`],
    [list({}), list({ group: 'sgd' }), `parameter 0 ('p0') has group 'muon' in the run, 'sgd' given`],
    [
      list({}),
      list({ gradient_dtype: 'bfloat16' }),
      `parameter 0 ('p0') has gradient_dtype 'float32' in the run, 'bfloat16' given`,
    ],
    [
      list({}),
      list({ update_dtype: 'float16' }),
      `parameter 0 ('p0') has update_dtype 'float32' in the run, 'float16' given`,
    ],
    [
      list({ split: [1, 5] }),
      list({ split: [5, 1] }),
      `parameter 0 ('p0') has split [ 1, 5 ] in the run, [ 5, 1 ] given`,
    ],
    [list({ heads: 2 }), list({}), `parameter 0 ('p0') has heads 2 in the run, undefined given`],
    [list({}), list({ matrices: 'batch' }), `parameter 0 ('p0') has matrices undefined in the run, 'batch' given`],
    [list({}, {}), list({}), 'it has 2 parameters, 1 given'],
    [list({}), list({}, {}), 'it has 1 parameters, 2 given'],
  ]
  for (const [existing, given, text] of cases) t.equal(atOnce(findingDifference(existing, given)), text)
})

t.test('parameters that differ in anything are laid out apart, those that do not are laid out once', async (t) => {
  const declared: Partial<ParameterDeclaration>[] = [
    {},
    { shape: [4, 6] },
    { shape: [6, 2, 2], matrices: 'flatten' },
    { shape: [6, 2, 2], matrices: 'batch' },
    { split: [2, 4] },
    { split: [4, 2] },
    { heads: 2 },
    { gradient_dtype: 'bfloat16' },
    { update_dtype: 'bfloat16' },
    { group: 'sgd' },
  ]
  const twice = [...declared, ...declared].map((change, i) => raw({ ...change, name: `p${i}` }))
  const parameters = parseParameters(twice, GROUPS)
  for (const [i, parameter] of parameters.entries()) {
    const [alone] = parseParameters([{ ...twice[i]!, name: `p${i}` }], GROUPS)
    t.same({ ...parameter, index: 0 }, alone)
  }
  const forms = new Set(parameters.map(({ state }) => state))
  t.equal(forms.size, declared.length)
})
