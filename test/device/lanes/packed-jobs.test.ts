import { deserialize, serialize } from 'node:v8'
import fc from 'fast-check'
import t from 'tap'
import type { Blocks, Job, JobResult, Look, Request } from '../../../src/device/job.js'
import { packJobs, packResults, unpackJobs, unpackResults } from '../../../src/device/lanes/packed-jobs.js'
import { type Span, wholeOf } from '../../../src/device/region.js'
import type { Plan } from '../../../src/optimizer/plan.js'

const word = fc.bigInt({ min: 0n, max: 2n ** 64n - 1n })
const words = fc.array(word, { maxLength: 3 })
const SGD = { kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'bfloat16' } as const
const planOf = (scale: number): Plan => {
  return { kernel: SGD, tasks: [{ dims: [4], offset: 0 }], scalars: { c_m: 1 }, scale, decay: 0, rms_factor: 1 }
}
const PLANS = [planOf(1), planOf(2)]
const WHOLES = [
  wholeOf({ pointer: 2n ** 63n, bytes: 2 ** 40 }, 'host'),
  wholeOf({ pointer: 64n, bytes: 8 }, 'gpu', true),
]

const span: fc.Arbitrary<Span> = fc
  .record({ whole: fc.constantFrom(...WHOLES), pointer: word, bytes: fc.nat() })
  .map(({ whole, pointer, bytes }) => ({ ...whole, pointer, bytes }))
const blocks: fc.Arbitrary<Blocks> = fc.record({ span, dtype: fc.constantFrom('int8_block256', 'int4_block64') })
const dtype = fc.constantFrom('float32' as const, 'bfloat16' as const, 'float16' as const)
const part = fc.record({ span, share: fc.double() })
const look: fc.Arbitrary<Look> = fc.record({ looksAt: dtype, gradient: span })
const job: fc.Arbitrary<Job> = fc.record({
  plan: fc.constantFrom(...PLANS),
  gradient: span,
  received: fc.option(blocks, { nil: undefined }),
  source: fc.option(span, { nil: undefined }),
  mean: fc.option(fc.record({ dtype, parts: fc.array(part, { maxLength: 3 }) }), { nil: undefined }),
  gradient_scale: fc.double(),
  state: fc.option(words, { nil: undefined }),
  next: words,
  update: span,
  sent: fc.option(blocks, { nil: undefined }),
  expected: fc.option(word, { nil: undefined }),
})
const result: fc.Arbitrary<JobResult> = fc.record({
  outcome: fc.constantFrom('computed', 'other_gradient', 'not_finite'),
  gradientFingerprint: word,
  updateFingerprint: word,
  gradientSquare: fc.double(),
  updateSquare: fc.double(),
  computeSeconds: fc.double(),
})

function plansOf(requests: readonly Request[]) {
  return requests.flatMap((request) => ('plan' in request ? [request.plan] : []))
}

t.test('any jobs arrive in another thread as they were, and share what they shared', async (t) => {
  fc.assert(
    fc.property(fc.array(fc.oneof(job, look), { maxLength: 20 }), (requests) => {
      const found = unpackJobs(deserialize(serialize(packJobs(requests))))
      const [sent, come] = [requests, found].map(plansOf)
      const alike = sent!.every((plan, i) => (plan === sent![0]) === (come![i] === come![0]))
      return alike && t.same(found, requests)
    }),
    { seed: 5, numRuns: 200 },
  )
})

t.test('any results come back as they were', async (t) => {
  fc.assert(
    fc.property(fc.array(result, { maxLength: 20 }), (results) => {
      return t.same(unpackResults(deserialize(serialize(packResults(results)))), results)
    }),
    { seed: 6, numRuns: 200 },
  )
})
