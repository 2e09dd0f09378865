import type { Dtype } from '../dtype.js'
import type { KernelSpec, StateIo } from '../kernel.js'

/** How the CUDA sources name an element type. */
const TYPE_NAMES = { float32: 'f32', float16: 'f16', bfloat16: 'bf16' } as const satisfies Record<Dtype, string>

/** Elements that a thread takes at a time: from every matrix whose number of elements is a multiple of it; else one. */
export const VECTOR = 4

/** The gradient's type, and that of the momentum buffer where it is not float32. */
type MomentumTypes = { readonly gradient_dtype: Dtype; readonly momentum_dtype?: StateIo['dtype'] }

/** The type of the matrix that matrix products read and write: float32 where the shorter side is small (small.cu). */
export type ProductType = 'float16' | 'float32'

/** Bytes of a kernel's parameters: `struct List` (list.cu), which has the number of its items first. */
export const LIST_BYTES = 4096

/** The most items of a kernel's list; an item has `parameters` parameters, its first block and its number of blocks. */
export function mostItems(parameters: number): number {
  return Math.floor((LIST_BYTES - 8) / (8 * (parameters + 2)))
}

/**
 * The names of the kernels. Each takes a list of items, and each parameter of an item has 8 bytes: a pointer, a u64 or
 * a double.
 */
export const CUDA_KERNELS = {
  scan: (dtype: Dtype) => `scan_${TYPE_NAMES[dtype]}`,
  momentum: (types: MomentumTypes, vector: boolean) => `momentum_${momentumTypes(types)}_${packOf(vector)}`,
  normalize: (types: MomentumTypes, product: ProductType, vector: boolean) =>
    `normalize_${momentumTypes(types)}_${TYPE_NAMES[product]}_${packOf(vector)}`,
  finish: (dtype: Dtype, product: ProductType, vector: boolean) =>
    `finish_${TYPE_NAMES[product]}_${TYPE_NAMES[dtype]}_${packOf(vector)}`,
  resize: () => 'resize_f16',
  second: (per: 'row' | 'col', product: ProductType) => `second_${per}_${TYPE_NAMES[product]}`,
  even: (dtype: Dtype, product: ProductType, vector: boolean) =>
    `even_${TYPE_NAMES[product]}_${TYPE_NAMES[dtype]}_${packOf(vector)}`,
  smallGram: () => 'small_gram_f32',
  smallIterate: () => 'small_iterate_f64',
  smallApply: () => 'small_apply_f32',
  elementwise: ({ gradient_dtype, update_dtype, ...spec }: KernelSpec) => {
    const kind = spec.kind === 'adamw' && spec.amsgrad ? 'amsgrad' : spec.kind
    return `${kind}_${TYPE_NAMES[gradient_dtype]}_${TYPE_NAMES[update_dtype]}`
  },
  collect: () => 'collect',
} as const

function momentumTypes({ gradient_dtype, momentum_dtype = 'float32' }: MomentumTypes): string {
  return `${TYPE_NAMES[gradient_dtype]}_${TYPE_NAMES[momentum_dtype]}`
}

function packOf(vector: boolean): number {
  return vector ? VECTOR : 1
}

const TYPES = ['float32', 'float16', 'bfloat16'] as const
const BUFFER_TYPES = ['float32', 'bfloat16'] as const
const PRODUCT_TYPES = ['float16', 'float32'] as const satisfies ProductType[]
const VECTORS = [false, true] as const

/** The kernels of scan.cu, collect.cu and muon.cu for every element type, pack size and type of the momentum buffer. */
export function muonEntryPoints(): string {
  return lines([
    collectEntryPoint(),
    resizeEntryPoint(),
    ...TYPES.flatMap((type) => [scanEntryPoint(type), '', ...VECTORS.flatMap((v) => matrixEntryPoints(type, v))]),
  ])
}

/**
 * The kernels of normuon.cu: NorMuon (kernels/normuon.ts) after Newton-Schulz, each launched for one matrix at a time.
 * O is `o` times `output_scale`; `second_row` or `second_col` makes V' of it, and `even` the update. `second` is V,
 * which is null before the first step.
 */
export function normuonEntryPoints(): string {
  const all = PRODUCT_TYPES.flatMap((product) => [
    secondEntryPoint('row', product),
    secondEntryPoint('col', product),
    ...TYPES.flatMap((type) => VECTORS.map((vector) => evenEntryPoint(type, product, vector))),
  ])
  return lines(all)
}

/**
 * The kernels of small.cu, one after the other: `grams` are the parts of XXᵀ that the blocks of the first have made,
 * and `p` is the second matrix of `work`.
 */
export function smallEntryPoints(): string {
  const shape = ['u64 side', 'u64 length', 'u64 tall']
  return lines([
    entryPoint(CUDA_KERNELS.smallGram(), 'small_gram', ['const f32 *x', 'double *grams', ...shape]),
    entryPoint(CUDA_KERNELS.smallIterate(), 'small_iterate', [
      ...['const double *grams', 'u64 parts', 'double *work', 'u64 side', 'const double *triples', 'u64 count'],
    ]),
    entryPoint(CUDA_KERNELS.smallApply(), 'small_apply', ['const double *p', 'const f32 *x', 'f32 *o', ...shape]),
  ])
}

/**
 * The kernels of elementwise.cu, the algorithms without matrix products, for every pair of a gradient's type and an
 * update's. Their formulas and the order of operations are those of kernels/adamw.ts, kernels/rmsprop.ts and
 * kernels/sgd.ts. A state pointer is null before the first step.
 */
export function elementwiseEntryPoints(): string {
  return lines(TYPES.flatMap((from) => TYPES.flatMap((to) => elementwiseEntryPointsOf(from, to))))
}

/**
 * The text of a kernel that calls a template for a block's part of its item: with the item's own parameters, or with
 * the expressions in `given`.
 */
function entryPoint(
  name: string,
  template: string,
  parameters: readonly string[],
  given = parameters.map((parameter) => parameter.replace(/^.*\W/, '')),
): string {
  const passed = given.map((expression) => (expression.startsWith('(') ? expression : `item.${expression}`))
  return [
    `struct ${name}_item { ${parameters.join('; ')}; u64 first, blocks; };`,
    `extern "C" __global__ void ${name}(const __grid_constant__ List<${name}_item> list) {`,
    `  const ${name}_item item = list.items[item_of(list, blockIdx.x)];`,
    `  ${template}(${passed.join(', ')}, Part{blockIdx.x - item.first, item.blocks});`,
    '}',
  ].join('\n')
}

function collectEntryPoint(): string {
  return entryPoint(CUDA_KERNELS.collect(), 'collect', [
    ...['const Partial *gradient', 'u64 gradient_blocks', 'u64 gradient_bytes'],
    ...['const Partial *update', 'u64 update_blocks', 'u64 update_bytes'],
    ...['const Partial *checks', 'u64 check_blocks', 'volatile Result *result'],
  ])
}

function resizeEntryPoint(): string {
  return entryPoint(CUDA_KERNELS.resize(), 'resize', [
    ...['const f16 *from', 'u64 from_rows', 'u64 from_cols', 'f16 *to', 'u64 rows', 'u64 cols'],
  ])
}

function secondEntryPoint(per: 'row' | 'col', product: ProductType): string {
  const type = TYPE_NAMES[product]
  return entryPoint(CUDA_KERNELS.second(per, product), `second_by_${per}<${type}>`, [
    ...[`const ${type} *o`, 'const f32 *second', 'f32 *next', 'u64 rows', 'u64 cols', 'Second s', 'Partial *partials'],
  ])
}

function scanEntryPoint(dtype: Dtype): string {
  const parameters = ['const u64 *words', 'u64 *copy', 'u64 bytes', 'Partial *partials']
  return entryPoint(CUDA_KERNELS.scan(dtype), `scan<${TYPE_NAMES[dtype]}>`, parameters)
}

function matrixEntryPoints(gradient_dtype: Dtype, vector: boolean): string[] {
  const [type, pack] = [TYPE_NAMES[gradient_dtype], packOf(vector)]
  const momentum = BUFFER_TYPES.flatMap((momentum_dtype) => {
    const types = { gradient_dtype, momentum_dtype }
    const buffer = TYPE_NAMES[momentum_dtype]
    return [
      entryPoint(CUDA_KERNELS.momentum(types, vector), `momentum<${type}, ${buffer}, ${pack}>`, [
        ...[`const ${type} *gradient`, `const ${buffer} *buffer`, `${buffer} *next`, 'u64 count'],
        ...['u64 matrix_blocks', 'u64 scans', 'u64 first_word', `${type} *copy`, 'Momentum s', 'Partial *partials'],
      ]),
      ...PRODUCT_TYPES.map((product) => normalizeEntryPoint(types, product, vector)),
    ]
  })
  return [...momentum, ...PRODUCT_TYPES.map((product) => finishEntryPoint(gradient_dtype, product, vector))]
}

function normalizeEntryPoint(types: Required<MomentumTypes>, product: ProductType, vector: boolean): string {
  const [gradient, buffer] = [TYPE_NAMES[types.gradient_dtype], TYPE_NAMES[types.momentum_dtype]]
  const [x, pack] = [TYPE_NAMES[product], packOf(vector)]
  return entryPoint(
    CUDA_KERNELS.normalize(types, product, vector),
    `normalize<${gradient}, ${buffer}, ${x}, ${pack}>`,
    [
      ...[`const ${gradient} *gradient`, `const ${buffer} *next`, `${x} *x`, 'u64 count'],
      ...['Momentum s', 'double eps', 'double input_scale', 'const Partial *partials', 'u64 partial_blocks'],
    ],
  )
}

function finishEntryPoint(dtype: Dtype, product: ProductType, vector: boolean): string {
  const [o, type] = [TYPE_NAMES[product], TYPE_NAMES[dtype]]
  return entryPoint(CUDA_KERNELS.finish(dtype, product, vector), `finish<${o}, ${type}, ${packOf(vector)}>`, [
    ...[`const ${o} *o`, `${type} *data`, 'u64 count', 'double factor'],
    ...['u64 scans', 'u64 first_word', 'Partial *partials'],
  ])
}

function evenEntryPoint(dtype: Dtype, product: ProductType, vector: boolean): string {
  const [o, type] = [TYPE_NAMES[product], TYPE_NAMES[dtype]]
  return entryPoint(CUDA_KERNELS.even(dtype, product, vector), `even<${o}, ${type}, ${packOf(vector)}>`, [
    ...[`const ${o} *o`, `${type} *data`, 'u64 count', 'double factor', 'const f32 *second'],
    ...['u64 cols', 'u64 by_row', 'const Partial *partials', 'u64 partial_blocks'],
  ])
}

function elementwiseEntryPointsOf(gradient_dtype: Dtype, update_dtype: Dtype): string[] {
  const types = { gradient_dtype, update_dtype }
  const gradient = `const ${TYPE_NAMES[gradient_dtype]} *gradient`
  const out = [`${TYPE_NAMES[update_dtype]} *data`, 'u64 count']
  const partials = 'Partial *partials'
  const [moments, nextMoments] = [
    ['const f32 *m', 'const f32 *v'],
    ['f32 *m_next', 'f32 *v_next'],
  ]
  return [
    entryPoint(
      CUDA_KERNELS.elementwise({ kind: 'adamw', ...types }),
      'adamw',
      [gradient, ...moments, ...nextMoments, ...out, 'Adamw s', partials],
      ['gradient', 'm', 'v', '(const f32 *)0', 'm_next', 'v_next', '(f32 *)0', 'data', 'count', 's', 'partials'],
    ),
    entryPoint(CUDA_KERNELS.elementwise({ kind: 'adamw', amsgrad: true, ...types }), 'adamw', [
      ...[gradient, ...moments, 'const f32 *largest', ...nextMoments, 'f32 *largest_next'],
      ...[...out, 'Adamw s', partials],
    ]),
    entryPoint(CUDA_KERNELS.elementwise({ kind: 'rmsprop', ...types }), 'rmsprop', [
      ...[gradient, 'const f32 *v', 'const f32 *buffer', 'f32 *v_next', 'f32 *next'],
      ...[...out, 'Rmsprop s', partials],
    ]),
    entryPoint(CUDA_KERNELS.elementwise({ kind: 'sgd', ...types }), 'sgd', [
      ...[gradient, 'const f32 *buffer', 'f32 *next'],
      ...[...out, 'Momentum s', partials],
    ]),
  ]
}

function lines(all: readonly string[]): string {
  return `${all.join('\n')}\n`
}
