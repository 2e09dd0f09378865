import t, { type Test } from 'tap'
import type { Dtype } from '../../kernels/dtype.js'
import { NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { createScanner } from '../../src/device/cpu/scan.js'
import { openCuda } from '../../src/device/cuda/cuda.js'
import { Device } from '../../src/device/device.js'
import type { JobResult } from '../../src/device/job.js'
import { iterations } from '../../src/optimizer/coefficients.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import type { ParameterDeclaration } from '../../src/wire/frame.js'
import {
  type AdamwState,
  type AmsgradState,
  adamwStep,
  amsgradStep,
  frobenius,
  gaussian,
  momentumStep,
  normuonStep,
  orthogonalizeByIteration,
  orthogonalizeBySvd,
  type RmspropState,
  relativeDistance,
  rmspropStep,
} from '../reference.js'
import { CUDA, NO_GPU } from './gpu.js'
import { bytesOf, floatsOf, startParameter } from './parameter.js'

const KELLER_JORDAN = Array.from({ length: 5 }, () => [3.4445, -4.775, 2.0315] as const)
const DTYPES = ['float32', 'bfloat16', 'float16'] as const
const TORCH = { momentum: 0.95, nesterov: true, momentum_form: 'ema' } as const

/** The largest distance to float64: matrices whose shorter side is at most 64 go through float64, others float16. */
function toleranceOf(rows: number, cols: number): number {
  if (Math.min(rows, cols) <= 64) return 1e-5
  // The fewer numbers, the wider rounding scatters.
  return rows * cols > 10_000 ? 2e-3 : 2.5e-3
}

t.test('the device alone', { skip: NO_GPU, timeout: 300_000 }, async (t) => {
  const device = await Device.start({ ...CUDA, lanes: 2, threads: 0, staging_bytes: 2 ** 28, state_bytes_limit: 0 })
  const scanner = createScanner()
  const gpu = openCuda(0)
  t.teardown(() => device.close())

  const start = (algorithm: Record<string, unknown>, declared: Partial<ParameterDeclaration>) =>
    startParameter(device, algorithm, declared)

  t.match(device.backend.name, /^cuda:0 NVIDIA/)

  for (const [rows, cols] of [
    [1, 1],
    [32, 1],
    [1, 53],
    [53, 1],
    [2, 3],
    [17, 701],
    [701, 17],
    [33, 77],
    [64, 64],
    [96, 40],
    [40, 96],
    [256, 64],
    [65, 72],
    [130, 67],
    [512, 1024],
    [1024, 512],
  ] as const) {
    for (const dtype of DTYPES) {
      // The oracle of the larger ones takes seconds.
      if (rows * cols > 20_000 && dtype !== 'bfloat16') continue
      await t.test(`muon ${rows}x${cols} ${dtype}: two steps near float64, and replayed`, async (t) => {
        const p = start({ algorithm: 'muon' }, { shape: [rows, cols], gradient_dtype: dtype })
        let buffer = new Float64Array(rows * cols)
        for (const step of [1, 2]) {
          const sent = bytesOf(gaussian(step, rows * cols), dtype)
          const gradient = floatsOf(sent, dtype)
          const { result, data } = await p.compute(sent, { step })
          const oracle = momentumStep(buffer, gradient, TORCH)
          buffer = oracle.buffer
          const o = orthogonalizeByIteration({ rows, cols, data: oracle.direction }, KELLER_JORDAN)
          t.equal(result.outcome, 'computed')
          const distance = relativeDistance(floatsOf(data, 'float32'), o.data)
          t.ok(distance < toleranceOf(rows, cols), `step ${step}: distance ${distance}`)
          t.ok(relativeDistance(p.read(0), buffer) < 1e-6, 'the momentum buffer is float32')
          sameScan(t, result, { gradient: sent, dtype, update: data })
          const again = await p.compute(sent, { step, replay: true })
          t.equal(Buffer.compare(again.data, data), 0, 'the replay is the same bytes')
        }
        p.end()
      })
    }
  }

  const triple = [2.5, -2.2, 0.7] as const
  const sets = {
    ...Object.fromEntries(Object.keys(NAMED_COEFFICIENTS).map((name) => [name, { ns_coefficients: name }])),
    'keller_jordan, six iterations': { ns_steps: 6 },
    'keller_jordan, ten iterations': { ns_steps: 10 },
    'keller_jordan, twenty iterations': { ns_steps: 20 },
    'one triple': { ns_coefficients: triple },
    'one triple of a cubic': { ns_coefficients: [[1.5, -0.5, 0]] },
    'one triple, once': { ns_coefficients: triple, ns_steps: 1 },
  }
  for (const [name, asked] of Object.entries(sets)) {
    await t.test(`small matrices with ${name} are float64's within 1e-5`, async (t) => {
      const group = parseGroup({ name: 'g', algorithm: 'muon', ...asked })
      if (group.algorithm !== 'muon') throw new Error(`the group is of ${group.algorithm}`)
      const coefficients = iterations(group.hyperparameters)
      for (const [rows, cols] of [
        [53, 1],
        [1, 53],
        [17, 301],
        [33, 77],
        [256, 64],
      ] as const) {
        const p = start({ algorithm: 'muon', momentum: 0, ...asked }, { shape: [rows, cols] })
        const sent = bytesOf(gaussian(60, rows * cols), 'float32')
        const { data } = await p.compute(sent, { step: 1 })
        const o = orthogonalizeByIteration({ rows, cols, data: floatsOf(sent, 'float32') }, coefficients)
        const distance = relativeDistance(floatsOf(data, 'float32'), o.data)
        t.ok(distance < 1e-5, `${rows}x${cols}: distance ${distance}`)
        p.end()
      }
    })
  }

  for (const name of ['polar_express', 'deepseek_v4'] as const) {
    await t.test(`512x1024 with ${name} is float64's within 2e-3`, async (t) => {
      const [rows, cols] = [512, 1024]
      const group = parseGroup({ name: 'g', algorithm: 'muon', ns_coefficients: name })
      if (group.algorithm !== 'muon') throw new Error(`the group is of ${group.algorithm}`)
      const p = start({ algorithm: 'muon', momentum: 0, ns_coefficients: name }, { shape: [rows, cols] })
      const sent = bytesOf(gaussian(61, rows * cols), 'float32')
      const { result, data } = await p.compute(sent, { step: 1 })
      const matrix = { rows, cols, data: floatsOf(sent, 'float32') }
      const o = orthogonalizeByIteration(matrix, iterations(group.hyperparameters))
      const distance = relativeDistance(floatsOf(data, 'float32'), o.data)
      t.ok(distance < 2e-3, `distance ${distance}`)
      sameScan(t, result, { gradient: sent, dtype: 'float32', update: data })
      p.end()
    })
  }

  function sameScan(
    t: Test,
    result: JobResult,
    { gradient, dtype, update }: { gradient: Uint8Array; dtype: Dtype; update: Uint8Array },
  ) {
    const [ours, theirs] = [scanner.scan(gradient, dtype), scanner.scan(update, 'float32')]
    t.equal(result.gradientFingerprint, ours.fingerprint, "the fingerprints are the CPU's")
    t.equal(result.updateFingerprint, theirs.fingerprint)
    t.ok(Math.abs(result.gradientSquare / ours.squareSum - 1) < 1e-12)
    t.ok(Math.abs(result.updateSquare / theirs.squareSum - 1) < 1e-12)
  }

  await t.test('any scale of a float32 gradient gives the same direction', async (t) => {
    for (const [rows, cols] of [
      [64, 96],
      [96, 128],
    ] as const) {
      const values = gaussian(7, rows * cols)
      const o = orthogonalizeByIteration({ rows, cols, data: values }, KELLER_JORDAN)
      for (const scale of [1e-37, 1e-30, 1e-10, 1, 1e10, 1e30, 1e36]) {
        const p = start({ algorithm: 'muon', momentum: 0 }, { shape: [rows, cols] })
        const scaled = values.map((value) => value * scale)
        const { result, data } = await p.compute(bytesOf(scaled, 'float32'), { step: 1 })
        t.equal(result.outcome, 'computed')
        const distance = relativeDistance(floatsOf(data, 'float32'), o.data)
        t.ok(distance < toleranceOf(rows, cols), `${rows}x${cols}, scale ${scale}: distance ${distance}`)
        p.end()
      }
    }
  })

  await t.test('zero gives zero', async (t) => {
    for (const [rows, cols] of [
      [48, 32],
      [1, 7],
      [96, 128],
    ] as const) {
      const p = start({ algorithm: 'muon' }, { shape: [rows, cols] })
      const { result, data } = await p.compute(new Uint8Array(rows * cols * 4), { step: 1 })
      t.equal(result.outcome, 'computed')
      t.ok(
        data.every((byte) => byte === 0),
        `${rows}x${cols}`,
      )
      p.end()
    }
  })

  await t.test('vectors, single numbers and a rank-1 matrix keep their sign', async (t) => {
    for (const [rows, cols] of [
      [1, 512],
      [512, 1],
      [1, 1],
      [64, 48],
      [128, 96],
    ] as const) {
      const [left, right] = [gaussian(rows, rows), gaussian(cols + 1, cols)]
      const values = Float64Array.from(
        { length: rows * cols },
        (_, i) => left[Math.floor(i / cols)]! * right[i % cols]!,
      )
      const p = start({ algorithm: 'muon', momentum: 0 }, { shape: [rows, cols] })
      const { data } = await p.compute(bytesOf(values, 'float32'), { step: 1 })
      const o = orthogonalizeBySvd({ rows, cols, data: values }, KELLER_JORDAN)
      const ours = floatsOf(data, 'float32')
      const cosine = ours.reduce((sum, x, i) => sum + x * o.data[i]!, 0) / (frobenius(ours) * frobenius(o.data))
      t.ok(cosine > 0.9, `${rows}x${cols}: cosine ${cosine}`)
      p.end()
    }
  })

  await t.test('NaN and infinity are told and nothing else is', async (t) => {
    for (const algorithm of ['muon', 'adamw', 'rmsprop', 'sgd']) {
      for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
        for (const [rows, cols] of [
          [40, 24],
          [128, 96],
        ] as const) {
          const p = start({ algorithm }, { shape: [rows, cols] })
          const values = gaussian(3, rows * cols)
          values[517] = bad
          t.match(await p.compute(bytesOf(values, 'float32'), { step: 1 }), { result: { outcome: 'not_finite' } })
          p.end()
        }
      }
    }
    const p = start({ algorithm: 'adamw' }, { shape: [8] })
    const { result } = await p.compute(bytesOf(Float64Array.of(1, 2, 3, 4, 5, 6, 7, 2e20), 'float32'), { step: 1 })
    t.equal(result.outcome, 'not_finite', 'the square of 2e20 is not a float32')
    p.end()
  })

  const OPTIONS = [{}, { second_momentum: 'normuon', momentum_dtype: 'bfloat16' }]
  const SHAPES = [
    [24, 40],
    [7, 11],
    [72, 96],
    [70, 65],
  ] as const
  for (const [options, [rows, cols]] of OPTIONS.flatMap((one) => SHAPES.map((shape) => [one, shape] as const))) {
    await t.test(
      `a batch, heads and a split are the ${rows}x${cols} matrices, bit for bit ${JSON.stringify(options)}`,
      async (t) => {
        const values = bytesOf(gaussian(11, 3 * rows * cols), 'float32')
        const whole = new Map<string, Uint8Array>()
        for (const [name, declared] of Object.entries({
          batch: { shape: [3, rows, cols], matrices: 'batch' },
          heads: { shape: [3 * rows, cols], heads: 3 },
          split: { shape: [3 * rows, cols], split: [rows, rows, rows] },
        } as const)) {
          const p = start({ algorithm: 'muon', ...options }, declared)
          whole.set(name, (await p.compute(values, { step: 1 })).data)
          p.end()
        }
        const separate: Uint8Array[] = []
        for (let i = 0; i < 3; i++) {
          const p = start({ algorithm: 'muon', ...options }, { shape: [rows, cols] })
          separate.push(
            (await p.compute(values.subarray(i * rows * cols * 4, (i + 1) * rows * cols * 4), { step: 1 })).data,
          )
          p.end()
        }
        for (const [name, data] of whole) t.equal(Buffer.compare(data, Buffer.concat(separate)), 0, name)
      },
    )
  }

  for (const [rows, cols] of [
    [64, 64],
    [96, 40],
    [40, 96],
    [33, 77],
    [17, 701],
    [1, 64],
    [64, 1],
    [65, 77],
    [512, 1024],
    [1024, 512],
  ] as const) {
    await t.test(`NorMuon ${rows}x${cols}: three steps near float64, and replayed`, async (t) => {
      const p = start({ algorithm: 'muon', second_momentum: 'normuon' }, { shape: [rows, cols] })
      let buffer = new Float64Array(rows * cols)
      let second = new Float64Array(Math.max(rows, cols))
      for (const step of [1, 2, 3]) {
        const sent = bytesOf(gaussian(step, rows * cols), 'float32')
        const momentum = momentumStep(buffer, floatsOf(sent, 'float32'), TORCH)
        buffer = Float64Array.from(momentum.buffer)
        const o = orthogonalizeByIteration({ rows, cols, data: momentum.direction }, KELLER_JORDAN)
        const oracle = normuonStep(second, o, 0.95)
        second = Float64Array.from(oracle.second)
        const { result, data } = await p.compute(sent, { step })
        t.equal(result.outcome, 'computed')
        const distance = relativeDistance(floatsOf(data, 'float32'), oracle.data)
        const most = Math.min(rows, cols) <= 64 ? 1e-5 : 5e-3
        t.ok(distance < most, `step ${step}: distance ${distance}`)
        const statistic = relativeDistance(p.read(1), second)
        t.ok(statistic < most, `step ${step}: second momentum ${statistic}`)
        sameScan(t, result, { gradient: sent, dtype: 'float32', update: data })
        const again = await p.compute(sent, { step, replay: true })
        t.equal(Buffer.compare(again.data, data), 0, 'the replay is the same bytes')
      }
      p.end()
    })
  }

  await t.test('what is computed beside a matrix, and in which order, changes no bit', async (t) => {
    const shapes = [
      [1, 1],
      [1, 300],
      [300, 1],
      [17, 701],
      [33, 77],
      [64, 64],
      [700, 64],
      [96, 128],
      [512, 1024],
      [1024, 512],
    ]
    const sent = shapes.map(([rows, cols], i) => bytesOf(gaussian(70 + i, rows! * cols!), 'float32'))
    const results = async (order: readonly number[], together: boolean) => {
      const all = new Map<number, Uint8Array>()
      const one = async (i: number) => {
        const p = start({ algorithm: 'muon' }, { shape: shapes[i]! })
        all.set(i, (await p.compute(sent[i]!, { step: 1 })).data)
        p.end()
      }
      if (together) await Promise.all(order.map(one))
      else for (const i of order) await one(i)
      return all
    }
    const order = [...shapes.keys()]
    const alone = await results(order, false)
    for (const [name, beside] of Object.entries({
      together: await results(order, true),
      backwards: await results(order.toReversed(), true),
    }))
      for (const i of order) t.equal(Buffer.compare(beside.get(i)!, alone.get(i)!), 0, `${shapes[i]} ${name}`)
  })

  await t.test('a kernel that is flattened is the matrix of its first side by all others, bit for bit', async (t) => {
    const values = bytesOf(gaussian(80, 12 * 75), 'float32')
    const [p, q] = [
      [12, 3, 5, 5],
      [12, 75],
    ].map((shape) => {
      return start({ algorithm: 'muon' }, shape.length > 2 ? { shape, matrices: 'flatten' } : { shape })
    })
    const [flattened, matrix] = [await p!.compute(values, { step: 1 }), await q!.compute(values, { step: 1 })]
    t.equal(Buffer.compare(flattened.data, matrix.data), 0)
    p!.end()
    q!.end()
  })

  await t.test('NorMuon of a split with a row, a square and a tall block is each by itself', async (t) => {
    const heights = [1, 16, 40]
    const group = { algorithm: 'muon', second_momentum: 'normuon', adjust_lr_fn: 'none' }
    const values = bytesOf(gaussian(17, 57 * 16), 'float32')
    const p = start(group, { shape: [57, 16], split: heights })
    const whole = (await p.compute(values, { step: 1 })).data
    let first = 0
    let line = 0
    for (const rows of heights) {
      const q = start(group, { shape: [rows, 16] })
      const range = [first * 16 * 4, (first + rows) * 16 * 4] as const
      const { data } = await q.compute(values.subarray(...range), { step: 1 })
      t.equal(Buffer.compare(whole.subarray(...range), data), 0, `${rows} rows`)
      const lines = Math.max(rows, 16)
      t.same(p.read(1).subarray(line, line + lines), q.read(1))
      first += rows
      line += lines
      q.end()
    }
    p.end()
  })

  await t.test('NorMuon gives zero for zero', async (t) => {
    const p = start({ algorithm: 'muon', second_momentum: 'normuon' }, { shape: [48, 32] })
    for (const replay of [false, true]) {
      const { result, data } = await p.compute(new Uint8Array(48 * 32 * 4), { step: 1, replay })
      t.equal(result.outcome, 'computed')
      t.ok(data.every((byte) => byte === 0))
    }
    p.end()
  })

  for (const [rows, cols] of [
    [33, 77],
    [64, 96],
    [96, 128],
  ] as const) {
    await t.test(`a bfloat16 buffer of ${rows}x${cols} is rounded to nearest before it is used`, async (t) => {
      const p = start({ algorithm: 'muon', momentum_dtype: 'bfloat16' }, { shape: [rows, cols] })
      let buffer = new Float64Array(rows * cols)
      for (const step of [1, 2, 3]) {
        const sent = bytesOf(gaussian(40 + step, rows * cols), 'float32')
        const gradient = floatsOf(sent, 'float32')
        const exact = momentumStep(buffer, gradient, TORCH).buffer
        const { result, data } = await p.compute(sent, { step })
        t.equal(result.outcome, 'computed')
        const kept = p.read(0)
        // Half a unit in the last place of eight bits, and what float32 adds to it.
        const largest = Math.max(...exact.map(Math.abs))
        const far = kept.filter((b, i) => Math.abs(b - exact[i]!) > Math.abs(exact[i]!) * 2 ** -8 + largest * 2 ** -22)
        t.equal(far.length, 0, `step ${step}`)
        buffer = Float64Array.from(kept)
        const direction = buffer.map((b, i) => 0.95 * b + (1 - 0.95) * gradient[i]!)
        const o = orthogonalizeByIteration({ rows, cols, data: direction }, KELLER_JORDAN)
        t.ok(relativeDistance(floatsOf(data, 'float32'), o.data) < toleranceOf(rows, cols))
        const again = await p.compute(sent, { step, replay: true })
        t.equal(Buffer.compare(again.data, data), 0, 'the replay is the same bytes')
      }
      p.end()
    })
  }

  await t.test('a bfloat16 buffer rounds ties to even', async (t) => {
    const p = start({ algorithm: 'muon', momentum: 0, momentum_dtype: 'bfloat16' }, { shape: [1, 3] })
    await p.compute(bytesOf(Float64Array.of(1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -8), 'float32'), { step: 1 })
    t.same([...p.read(0)], [1, 1 + 2 ** -6, -1])
    p.end()
  })

  for (const dtype of DTYPES) {
    await t.test(`amsgrad and rmsprop ${dtype} are float64's within 1e-6, and replayed`, async (t) => {
      const [size, shape] = [7007, [1001, 7]]
      const betas = [0.5, 0.6] as const
      const p = start({ algorithm: 'adam', amsgrad: true, betas }, { shape, gradient_dtype: dtype })
      const q = start({ algorithm: 'rmsprop', momentum: 0.9, alpha: 0.9 }, { shape, gradient_dtype: dtype })
      let adam: AmsgradState = {
        exp_avg: new Float64Array(size),
        exp_avg_sq: new Float64Array(size),
        max_exp_avg_sq: new Float64Array(size),
      }
      let rms: RmspropState = { square_avg: new Float64Array(size), momentum_buffer: new Float64Array(size) }
      for (const step of [1, 2, 3]) {
        const sent = bytesOf(
          gaussian(50 + step, size).map((value) => (value + 2) / step),
          dtype,
        )
        const gradient = floatsOf(sent, dtype)
        const [first, second] = [await p.compute(sent, { step }), await q.compute(sent, { step })]
        const amsgrad = amsgradStep(adam, gradient, { betas, eps: 1e-8, step })
        const rmsprop = rmspropStep(rms, gradient, { alpha: 0.9, eps: 1e-8, momentum: 0.9 })
        adam = amsgrad
        rms = rmsprop
        t.ok(relativeDistance(floatsOf(first.data, 'float32'), amsgrad.data) < 1e-6)
        t.ok(relativeDistance(p.read(2), amsgrad.max_exp_avg_sq) < 1e-6)
        t.ok(relativeDistance(floatsOf(second.data, 'float32'), rmsprop.data) < 1e-6)
        t.ok(relativeDistance(q.read(0), rmsprop.square_avg) < 1e-6)
        t.equal(Buffer.compare((await p.compute(sent, { step, replay: true })).data, first.data), 0)
        t.equal(Buffer.compare((await q.compute(sent, { step, replay: true })).data, second.data), 0)
      }
      p.end()
      q.end()
    })
  }

  await t.test('matrices of one parameter with different shapes each get their own factor', async (t) => {
    const [rows, cols] = [[40, 8], 16] as const
    const values = gaussian(13, 48 * cols)
    const p = start({ algorithm: 'muon', momentum: 0 }, { shape: [48, cols], split: [...rows] })
    const ours = floatsOf((await p.compute(bytesOf(values, 'float32'), { step: 1 })).data, 'float32')
    const blocks = [values.subarray(0, 40 * cols), values.subarray(40 * cols)]
    const expected = blocks.flatMap((data, i) => {
      const factor = Math.sqrt(Math.max(1, rows[i]! / cols))
      const o = orthogonalizeByIteration({ rows: rows[i]!, cols, data }, KELLER_JORDAN)
      return [...o.data.map((value) => value * factor)]
    })
    const distance = relativeDistance(ours, expected)
    t.ok(distance < 1e-5, `distance ${distance}`)
    p.end()
  })

  for (const dtype of DTYPES) {
    await t.test(`adamw and sgd ${dtype} are float64's within 1e-6, and replayed`, async (t) => {
      const shape = [1001, 7]
      const p = start({ algorithm: 'adamw' }, { shape, gradient_dtype: dtype })
      const q = start({ algorithm: 'sgd', momentum: 0.9, nesterov: true }, { shape, gradient_dtype: dtype })
      let state: AdamwState = { exp_avg: new Float64Array(7007), exp_avg_sq: new Float64Array(7007) }
      let buffer: Float64Array | undefined
      for (const step of [1, 2, 3]) {
        const sent = bytesOf(
          gaussian(20 + step, 7007).map((value) => value + 2),
          dtype,
        )
        const gradient = floatsOf(sent, dtype)
        const oracle = adamwStep(state, gradient, { betas: [0.9, 0.999], eps: 1e-8, step })
        state = { exp_avg: oracle.exp_avg, exp_avg_sq: oracle.exp_avg_sq }
        const [adamw, sgd] = [await p.compute(sent, { step }), await q.compute(sent, { step })]
        t.ok(relativeDistance(floatsOf(adamw.data, 'float32'), oracle.data) < 1e-6)
        t.ok(relativeDistance(p.read(1), oracle.exp_avg_sq) < 1e-6)
        const next: Float64Array = buffer ? buffer.map((b, i) => 0.9 * b + gradient[i]!) : gradient
        buffer = next
        const direction = gradient.map((g, i) => g + 0.9 * next[i]!)
        t.ok(relativeDistance(floatsOf(sgd.data, 'float32'), direction) < 1e-6)
        t.equal(Buffer.compare((await p.compute(sent, { step, replay: true })).data, adamw.data), 0)
        t.equal(Buffer.compare((await q.compute(sent, { step, replay: true })).data, sgd.data), 0)
      }
      p.end()
      q.end()
    })
  }

  await t.test('a thousand steps take no more device memory than ten', async (t) => {
    const p = start({ algorithm: 'muon' }, { shape: [256, 512] })
    const sent = bytesOf(gaussian(30, 256 * 512), 'float32')
    let after10 = 0
    for (let step = 1; step <= 1000; step++) {
      await p.compute(sent, { step })
      if (step === 10) after10 = gpu.memory().free
    }
    t.equal(gpu.memory().free, after10)
    p.end()
  })

  await t.test('parts of a large parameter are what they are alone, bit for bit', async (t) => {
    const [count, rows, cols] = [10, 2048, 4096]
    const noise = bytesOf(gaussian(40, 2 ** 20), 'bfloat16')
    // Every matrix starts elsewhere in the same noise.
    const gradient = new Uint8Array(count * rows * cols * 2)
    for (let at = 0; at < gradient.length; at += noise.length - 6)
      gradient.set(noise.subarray(0, Math.min(noise.length, gradient.length - at)), at)
    const declared = { gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' } as const
    const p = start({ algorithm: 'muon' }, { shape: [count, rows, cols], matrices: 'batch', ...declared })
    const { result, data } = await p.compute(gradient, { step: 1 })
    t.equal(result.outcome, 'computed')
    t.equal(result.gradientFingerprint, scanner.scan(gradient, 'bfloat16').fingerprint)
    t.equal(result.updateFingerprint, scanner.scan(data, 'bfloat16').fingerprint)
    const bytes = rows * cols * 2
    for (const i of [0, 7, 8, 9]) {
      const one = start({ algorithm: 'muon' }, { shape: [rows, cols], ...declared })
      const alone = await one.compute(gradient.subarray(i * bytes, (i + 1) * bytes), { step: 1 })
      t.equal(Buffer.compare(alone.data, data.subarray(i * bytes, (i + 1) * bytes)), 0, `matrix ${i}`)
      one.end()
    }
    p.end()
    const elements = 20 * 2 ** 20 + 3
    const q = start({ algorithm: 'adamw' }, { shape: [elements], ...declared })
    const whole = await q.compute(gradient.subarray(0, 2 * elements), { step: 1 })
    t.equal(whole.result.updateFingerprint, scanner.scan(whole.data, 'bfloat16').fingerprint)
    const from = elements - 1000
    const r = start({ algorithm: 'adamw' }, { shape: [1000], ...declared })
    const tail = await r.compute(gradient.slice(2 * from, 2 * elements), { step: 1 })
    t.equal(Buffer.compare(tail.data, whole.data.subarray(2 * from)), 0, 'the last elements of a tensor')
    q.end()
    r.end()
  })

  await t.test('a parameter may be of more matrices than a grid has blocks', async (t) => {
    const heads = 70_000
    const p = start({ algorithm: 'muon' }, { shape: [heads * 8, 8], heads })
    const values = gaussian(50, heads * 64)
    const { result, data } = await p.compute(bytesOf(values, 'float32'), { step: 1 })
    t.equal(result.outcome, 'computed')
    for (const head of [0, 32_767, 32_768, heads - 1]) {
      const block = values.subarray(head * 64, (head + 1) * 64)
      const o = orthogonalizeByIteration({ rows: 8, cols: 8, data: block }, KELLER_JORDAN)
      const distance = relativeDistance(floatsOf(data.slice(head * 256, (head + 1) * 256), 'float32'), o.data)
      t.ok(distance < 1e-4, `head ${head}: distance ${distance}`)
    }
    p.end()
  })
})
