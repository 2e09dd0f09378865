import fc from 'fast-check'
import t from 'tap'
import type { KernelSpec } from '../../kernels/kernel.js'
import { Admission, type Capacity } from '../../src/device/admission.js'
import { largest, scratchFor, totalOf } from '../../src/device/cuda/scratch.js'
import type { Demand } from '../../src/device/job.js'

const MUON: KernelSpec = {
  ...{ kind: 'muon', coefficients: [[2, -1.5, 0.5]], tall: false },
  ...{ gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' },
}
const STATE_REMEDY = 'delete a run, or start the service with a larger --state-bytes-limit'
const GPU: Capacity = {
  units: [{ name: 'cuda:0', bytes: 2 ** 30, kernels: 'own' }],
  ...{ hostBytes: 2 ** 24, lanes: 2, group: { jobs: 4, bytes: 2 ** 20 } },
}

function matrix(rows: number, cols: number): Demand {
  const plan = { kernel: MUON, tasks: [{ dims: [rows, cols], offset: 0 }], scalars: { output_scale: 1 } }
  const bytes = rows * cols * 2
  return {
    plan: { ...plan, scale: 1, decay: 0, rms_factor: 1 },
    ...{ gradient_bytes: bytes, update_bytes: bytes, state_bytes: 2 * bytes },
  }
}

t.test('a run is refused with what it needs beside its state, and what is left', async (t) => {
  const [small, large] = [matrix(64, 64), matrix(2048, 4096)]
  const roomy = new Admission(GPU)
  const grant = roomy.admit([small, small], 'run a')
  t.same(grant.bytes, [2 * 64 * 64 * 4])
  t.equal(grant.gradientBytes, 64 * 64 * 2)
  t.equal(grant.hostBytes, 3 * 64 * 64 * 2)
  t.equal(roomy.bytes, 2 * 64 * 64 * 4)
  const scratch = roomy.scratch(0)!
  t.same(scratch, scratchFor(grant.largest[0]!, GPU.group))
  // The next state of both can be in flight.
  const needed = 2 * roomy.bytes + 2 * totalOf(scratch)
  const exact = new Admission({ ...GPU, units: [{ ...GPU.units[0]!, bytes: needed }] })
  const granted = exact.admit([small, small], 'run a')
  t.throws(() => exact.admit([small], 'run b'), {
    code: 'OVER_CAPACITY',
    message: `run b needs ${2 * 64 * 64 * 4} bytes of memory on cuda:0, 0 are left: ${STATE_REMEDY}`,
  })
  exact.dismiss(granted)
  t.equal(exact.bytes, 0)
  exact.admit([small, small], 'run b')
  t.throws(() => exact.admit([large], 'run c'), {
    code: 'OVER_CAPACITY',
    message: /^run c needs \d{9} bytes of memory on cuda:0, 0 are left/,
  })
})

t.test('updates, and the largest gradient, have a limit of their own on the host', async (t) => {
  const admission = new Admission(GPU)
  admission.admit([matrix(2048, 1024), matrix(64, 64)], 'run a')
  const left = 2 ** 24 - 2 ** 23 - 2 ** 13
  t.throws(() => admission.admit([matrix(1024, 2056), matrix(1024, 2040)], 'run b'), {
    message: `run b needs ${2 ** 23 + 2 ** 11 * 2056} bytes of memory of the host for gradients and updates, ${left} are left: delete a run, or use a host with more memory`,
  })
})

t.test('where lanes set nothing aside, state, updates and the largest gradient are all that counts', async (t) => {
  const bytes = 64 * 64 * 8 + 32 * 32 * 6
  const cpu = new Admission({ units: [{ name: 'cpu', bytes }], lanes: 4, group: { jobs: 1, bytes: 1 } })
  const grant = cpu.admit([matrix(64, 64), matrix(32, 32)], 'run a')
  t.same([grant.bytes, grant.gradientBytes, grant.hostBytes, grant.largest], [[bytes], 64 * 64 * 2, 0, [largest([])]])
  t.equal(cpu.bytes, bytes)
  t.equal(cpu.scratch(0), undefined)
})

t.test(
  'whatever comes and goes, what is granted never needs more than there is, and all of it comes back',
  async () => {
    const sizes = fc.array(
      fc.record({
        rows: fc.integer({ min: 1, max: 600 }),
        cols: fc.integer({ min: 1, max: 600 }),
        leave: fc.boolean(),
      }),
      { minLength: 1, maxLength: 30 },
    )
    fc.assert(
      fc.property(sizes, fc.integer({ min: 2 ** 20, max: 2 ** 26 }), (runs, bytes) => {
        const units = [0, 1].map((gpu) => ({
          name: `cuda:${gpu}`,
          bytes,
          kernels: gpu === 0 ? ('own' as const) : ('onnx' as const),
        }))
        const admission = new Admission({ ...GPU, units })
        const held = new Set<ReturnType<Admission['admit']>>()
        for (const { rows, cols, leave } of runs) {
          try {
            held.add(admission.admit([matrix(rows, cols), matrix(cols, rows)], 'run'))
          } catch (error) {
            if ((error as { code?: string }).code !== 'OVER_CAPACITY') throw error
          }
          for (const [unit] of units.entries()) {
            const state = [...held].reduce((sum, grant) => sum + grant.bytes[unit]!, 0)
            if (held.size > 0 && state + 2 * totalOf(admission.scratch(unit)!) > bytes) return false
          }
          const [oldest] = held
          if (leave && oldest) {
            admission.dismiss(oldest)
            held.delete(oldest)
          }
        }
        for (const grant of held) admission.dismiss(grant)
        return admission.bytes === 0
      }),
      { seed: 7 },
    )
  },
)

t.test('memory beside the runs is reserved on each unit by itself, and given back', async (t) => {
  const units = ['cuda:0', 'cuda:1'].map((name) => ({ name, bytes: 2 ** 20, kernels: 'own' as const }))
  const admission = new Admission({ ...GPU, units })
  const grant = admission.reserve([1000, 2000], 'state')
  t.same([grant.bytes, grant.hostBytes, admission.bytes], [[1000, 2000], 0, 3000])
  t.throws(() => admission.reserve([0, 2 ** 20], 'more state'), {
    code: 'OVER_CAPACITY',
    message: /^more state needs \d+ bytes of memory on cuda:1, \d+ are left: /,
  })
  admission.dismiss(grant)
  t.equal(admission.bytes, 0)
})
