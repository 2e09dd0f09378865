import fc from 'fast-check'
import t from 'tap'
import { DTYPES, isDtype } from '../../../kernels/dtype.js'
import type { KernelSpec } from '../../../kernels/kernel.js'
import { Elementwise } from '../../../src/device/cpu/elementwise.js'
import { type ElementwiseSpec, isElementwise } from '../../../src/device/cpu/formulas.js'
import type { Job, JobResult } from '../../../src/device/job.js'
import { hostSpace } from '../../../src/device/onnx/host-space.js'
import { OnnxExecutor } from '../../../src/device/onnx/onnx-executor.js'
import { copyMemory, type Pointer, viewMemory } from '../../../src/device/onnx/onnxruntime.js'
import { wholeOf } from '../../../src/device/region.js'
import { aroundTies, type Case, FORMS, freeJob, makeJob, PASSED_ON, runtime } from './jobs.js'

const onnx = new OnnxExecutor(runtime, hostSpace(runtime, 1), { half: false })
const elementwise = new Elementwise()
t.teardown(() => onnx.close())

const DTYPE_NAMES = Object.keys(DTYPES).filter(isDtype)
const KINDS = [{ kind: 'adamw' }, { kind: 'adamw', amsgrad: true }, { kind: 'rmsprop' }, { kind: 'sgd' }] as const
const SPECS: ElementwiseSpec[] = KINDS.flatMap((kind) =>
  DTYPE_NAMES.flatMap((gradient_dtype) =>
    DTYPE_NAMES.map((update_dtype) => ({ ...kind, gradient_dtype, update_dtype })),
  ),
)
/** More than a window, not a multiple of anything, and more than a slice of the ONNX executor. */
const SEVERAL_WINDOWS = 3 * 16_384 + 21
const SEVERAL_SLICES = 2 ** 18 + 13

/** Scalars of a step as the plans make them, and a step's replay. */
function scalarsOf(kind: KernelSpec['kind'], { beta, eps, step, replay, nesterov }: Drawn): Record<string, number> {
  const [kept, added] = replay ? [1, 0] : [beta, 1 - beta]
  switch (kind) {
    case 'adamw':
      return {
        ...{ a_m: kept, a_g: added, b_v: kept, b_g: added, eps },
        ...{ bias1: 1 - beta ** step, bias2_sqrt: Math.sqrt(1 - beta ** step) },
      }
    case 'rmsprop':
      return { b_v: kept, b_g: added, c_m: replay ? 1 : beta, c_g: replay ? 0 : 1, eps }
    default:
      return { c_m: kept, c_g: replay ? 0 : 1, n_m: nesterov ? beta : 1, n_g: nesterov ? 1 : 0 }
  }
}

type Drawn = { beta: number; eps: number; step: number; replay: boolean; nesterov: boolean }

const drawn = fc.record({
  beta: fc.constantFrom(0, 0.5, 0.9, 0.999),
  eps: fc.constantFrom(0, 1e-8, 1e-3),
  step: fc.integer({ min: 1, max: 2000 }),
  replay: fc.boolean(),
  nesterov: fc.boolean(),
})

const cases = fc
  .record({
    spec: fc.constantFrom(...SPECS),
    elements: fc.oneof(fc.integer({ min: 1, max: 130 }), fc.integer({ min: 1, max: 70_000 })),
    form: fc.constantFrom(...FORMS),
    seed: fc.nat(),
    zeroState: fc.boolean(),
    gradient_scale: fc.constantFrom(1, 1, -0.25, 1 / 3, 1e-30, 1e30),
    drawn,
  })
  .map(({ drawn, ...rest }): Case => {
    return { ...rest, replay: drawn.replay, scalars: scalarsOf(rest.spec.kind, drawn) }
  })

t.test('any job: state, update, fingerprints, squares and outcome are those of the ONNX graph', async (t) => {
  const outcomes = new Map<string, number>()
  fc.assert(
    fc.property(cases, (one) => {
      const { expected, found } = bothOf(one)
      outcomes.set(expected.result.outcome, (outcomes.get(expected.result.outcome) ?? 0) + 1)
      return same(expected, found)
    }),
    { seed: 11, numRuns: 600 },
  )
  t.ok((outcomes.get('computed') ?? 0) > 200, `computed: ${outcomes.get('computed')}`)
  t.ok((outcomes.get('not_finite') ?? 0) > 100, `not finite: ${outcomes.get('not_finite')}`)
})

t.test('every kernel and every pair of dtypes, over several windows', async (t) => {
  for (const [i, spec] of SPECS.entries()) {
    const scalars = scalarsOf(spec.kind, { beta: 0.9, eps: 1e-8, step: 3, replay: false, nesterov: true })
    const rest = { form: 'normal', seed: i, zeroState: false, replay: false, gradient_scale: 1, scalars } as const
    const { expected, found } = bothOf({ spec, elements: SEVERAL_WINDOWS, ...rest })
    t.equal(expected.result.outcome, 'computed')
    t.ok(same(expected, found), JSON.stringify(spec))
  }
})

t.test('more elements than the ONNX executor computes at a time', async (t) => {
  const spec = { kind: 'adamw', gradient_dtype: 'float32', update_dtype: 'bfloat16' } as const
  const scalars = scalarsOf('adamw', { beta: 0.9, eps: 1e-8, step: 3, replay: false, nesterov: true })
  const rest = { form: 'normal', seed: 5, zeroState: false, replay: false, gradient_scale: 1, scalars } as const
  const { expected, found } = bothOf({ spec, elements: SEVERAL_SLICES, ...rest })
  t.ok(same(expected, found))
})

t.test('float16 and bfloat16: every pattern is read as the ONNX graph reads it', async (t) => {
  for (const gradient_dtype of ['float16', 'bfloat16'] as const) {
    const spec = { kind: 'sgd', gradient_dtype, update_dtype: 'float32' } as const
    const job = makeJob({ spec, elements: 65_536, ...PASSED_ON })
    const patterns = new Uint16Array(viewMemory(job.gradient.pointer, job.gradient.bytes).buffer)
    const infinity = gradient_dtype === 'float16' ? 0x7c00 : 0x7f80
    patterns.forEach((_, i) => {
      patterns[i] = (i & 0x7fff) < infinity ? i : 0
    })
    const [expected, found] = [
      resultOf(job, () => onnx.run([job])[0]!),
      resultOf(job, () => elementwise.run(job, spec)),
    ]
    t.equal(expected.result.outcome, 'computed')
    t.ok(same(expected, found), gradient_dtype)
    freeJob(job, onnx)
  }
})

t.test('the numbers around every tie and every bound are rounded as the ONNX graph rounds them', async (t) => {
  for (const update_dtype of ['float16', 'bfloat16'] as const) {
    const spec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype } as const
    const bits = aroundTies(update_dtype)
    const job = makeJob({ spec, elements: bits.length, ...PASSED_ON })
    new Uint32Array(viewMemory(job.gradient.pointer, job.gradient.bytes).buffer).set(bits)
    const [expected, found] = [
      resultOf(job, () => onnx.run([job])[0]!),
      resultOf(job, () => elementwise.run(job, spec)),
    ]
    t.equal(expected.result.outcome, 'computed')
    t.ok(same(expected, found), update_dtype)
    freeJob(job, onnx)
  }
})

t.test('the first number that overflows an update makes the step not finite, and the one below does not', async (t) => {
  for (const [update_dtype, first] of [
    ['bfloat16', 0x7f7f8000],
    ['float16', 0x477ff000],
  ] as const) {
    const spec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype } as const
    for (const [bits, outcome] of [
      [first - 1, 'computed'],
      [first, 'not_finite'],
    ] as const) {
      const job = makeJob({ spec, elements: 1, ...PASSED_ON })
      new Uint32Array(viewMemory(job.gradient.pointer, 4).buffer)[0] = bits
      t.equal(onnx.run([job])[0]!.outcome, outcome)
      t.equal(elementwise.run(job, spec).outcome, outcome)
      freeJob(job, onnx)
    }
  }
})

t.test('an imported negative zero under amsgrad is a zero, and the update is that of the ONNX graph', async (t) => {
  const spec = { kind: 'adamw', amsgrad: true, gradient_dtype: 'float32', update_dtype: 'float32' } as const
  const scalars = scalarsOf('adamw', { beta: 0.9, eps: 1e-8, step: 1, replay: true, nesterov: false })
  const job = makeJob({ spec, elements: 9, ...PASSED_ON, scalars, zeroState: false })
  for (const pointer of job.state ?? []) new Uint32Array(viewMemory(pointer, 36).buffer).fill(0x80000000)
  const expected = resultOf(job, () => onnx.run([job])[0]!)
  const found = resultOf(job, () => elementwise.run(job, spec))
  t.same(withoutTime(found.result), withoutTime(expected.result))
  t.ok(found.update.equals(expected.update))
  // ONNX Runtime's maximum of 0 and -0 has the sign of one or the other by its place in the tensor.
  t.same(found.next.slice(1), [Buffer.alloc(36), Buffer.alloc(36)])
  freeJob(job, onnx)
})

t.test('a state whose NaN would be rounded to zero is not finite', async (t) => {
  const sgd = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'bfloat16' } as const
  const momentum = scalarsOf('sgd', { beta: 0.9, eps: 0, step: 2, replay: false, nesterov: false })
  const job = makeJob({ spec: sgd, elements: 9, ...PASSED_ON, scalars: momentum, zeroState: false })
  new Uint32Array(viewMemory(job.state![0]!, 36).buffer)[4] = 0xffffffff
  t.equal(elementwise.run(job, sgd).outcome, 'not_finite')
  freeJob(job, onnx)
})

t.test('another gradient than the expected one is told, with its fingerprint', async (t) => {
  const spec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' } as const
  const job = makeJob({ spec, elements: 100, ...PASSED_ON })
  const { gradientFingerprint } = elementwise.run(job, spec)
  t.equal(elementwise.run({ ...job, expected: gradientFingerprint }, spec).outcome, 'computed')
  const other = { ...job, expected: gradientFingerprint + 1n }
  const expected = resultOf(job, () => onnx.run([other])[0]!)
  t.same(
    withoutTime(elementwise.run(other, spec)),
    withoutTime(expected.result),
    'nothing is told of an update that nobody may use',
  )
  freeJob(job, onnx)
})

t.test('memory of a client is copied to the gradient, and computed on as it was copied', async (t) => {
  const spec = { kind: 'sgd', gradient_dtype: 'bfloat16', update_dtype: 'float32' } as const
  const elements = SEVERAL_WINDOWS
  const job = makeJob({ spec, elements, ...PASSED_ON, form: 'normal' })
  const expected = resultOf(job, () => onnx.run([job])[0]!)
  const pointer = runtime.allocate(job.gradient.bytes)
  copyMemory(pointer, job.gradient.pointer, job.gradient.bytes)
  const sent = viewMemory(pointer, job.gradient.bytes).slice()
  viewMemory(job.gradient.pointer, job.gradient.bytes).fill(0)
  const source = wholeOf({ pointer, bytes: job.gradient.bytes }, 'host', true)
  const found = resultOf(job, () => elementwise.run({ ...job, source }, spec))
  t.ok(same(expected, found))
  t.ok(Buffer.from(viewMemory(job.gradient.pointer, job.gradient.bytes)).equals(sent))
  runtime.free(pointer)
  freeJob(job, onnx)
})

t.test('a plan of several tasks is no elementwise one, and memory of another length is not touched', async (t) => {
  const spec = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' } as const
  const job = makeJob({ spec, elements: 8, ...PASSED_ON })
  const tasks = [4, 4].map((elements, i) => ({ dims: [elements], offset: 4 * i }))
  t.throws(() => elementwise.run({ ...job, plan: { ...job.plan, tasks } }, spec), {
    message: 'an elementwise plan has one task of all elements',
  })
  for (const other of ['gradient', 'update'] as const) {
    const shorter = { ...job, [other]: { ...job[other], bytes: job[other].bytes - 4 } }
    t.throws(() => elementwise.run(shorter, spec), {
      message: 'gradient and update have as many elements as the plan',
    })
  }
  t.notOk(isElementwise({ kind: 'muon', coefficients: [], tall: false, ...DTYPE_PAIR }))
  freeJob(job, onnx)
})

const DTYPE_PAIR = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
type Outcome = { result: JobResult; next: Buffer[]; update: Buffer }

function bothOf(one: Case): { expected: Outcome; found: Outcome } {
  const job = makeJob(one)
  const expected = resultOf(job, () => onnx.run([job])[0]!)
  const found = resultOf(job, () => elementwise.run(job, one.spec))
  freeJob(job, onnx)
  return { expected, found }
}

/** Runs a job over memory that holds nothing of an earlier run. */
function resultOf(job: Job, run: () => JobResult): Outcome {
  const elements = job.plan.tasks[0]!.dims[0]!
  for (const pointer of job.next) viewMemory(pointer, 4 * elements).fill(0xee)
  viewMemory(job.update.pointer, job.update.bytes).fill(0xee)
  const result = run()
  const copy = (pointer: Pointer, bytes: number) => Buffer.from(viewMemory(pointer, bytes))
  return {
    result,
    next: job.next.map((pointer) => copy(pointer, 4 * elements)),
    update: copy(job.update.pointer, job.update.bytes),
  }
}

/** What is not computed is not committed: its memory may hold anything. */
function same(expected: Outcome, found: Outcome): boolean {
  const [a, b] = [withoutTime(expected.result), withoutTime(found.result)]
  const told =
    a.outcome === b.outcome &&
    a.gradientFingerprint === b.gradientFingerprint &&
    a.updateFingerprint === b.updateFingerprint &&
    Object.is(a.updateSquare, b.updateSquare) &&
    Object.is(a.gradientSquare, b.gradientSquare)
  if (!told || a.outcome !== 'computed') return told
  return expected.update.equals(found.update) && expected.next.every((next, i) => next.equals(found.next[i]!))
}

function withoutTime({ computeSeconds: _, ...rest }: JobResult): Omit<JobResult, 'computeSeconds'> {
  return rest
}
