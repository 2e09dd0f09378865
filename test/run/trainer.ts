import { createHash } from 'node:crypto'
import type { OpenFrame, ReceiptFrame } from '../../src/wire/frame.js'
import { normal, RawClient, type Service } from '../service.js'

/** Every algorithm with every option that keeps state, and every layout; QK-clip's attentions lie in fused rows. */
export const MODEL = {
  groups: [
    { name: 'muon', algorithm: 'muon', lr: 0.02 },
    { name: 'muonclip', algorithm: 'muonclip', lr: 3e-4 },
    { name: 'normuon', algorithm: 'muon', second_momentum: 'normuon', momentum_dtype: 'bfloat16' },
    { name: 'adamw', preset: 'torch', algorithm: 'adamw' },
    { name: 'amsgrad', algorithm: 'adam', amsgrad: true },
    { name: 'rmsprop', algorithm: 'rmsprop', momentum: 0.9 },
    { name: 'sgd', algorithm: 'sgd', momentum: 0.9, nesterov: true },
  ],
  parameters: [
    { name: 'm', shape: [24, 16], group: 'muon' },
    { name: 'qk', shape: [16, 12], group: 'muonclip', split: [8, 8], gradient_dtype: 'float32' },
    { name: 'experts', shape: [2, 8, 6], group: 'normuon', matrices: 'batch' },
    { name: 'embedding', shape: [40, 8], group: 'adamw' },
    { name: 'scalar', shape: [], group: 'amsgrad' },
    { name: 'norm', shape: [9], group: 'rmsprop' },
    { name: 'bias', shape: [17], group: 'sgd' },
  ],
  attentions: [
    {
      name: 'a',
      threshold: 10,
      query_heads: 2,
      head_dim: 4,
      query: { parameter: 1 },
      key: { parameter: 1, first_row: 8 },
    },
  ],
} satisfies Pick<OpenFrame, 'groups' | 'parameters' | 'attentions'>

const COUNTS = MODEL.parameters.map(({ shape }) => shape.reduce((product, size) => product * size, 1))

/** The trace of a step: its receipt, and a hash of every update's bytes and factors. */
export type Trace = { step: number; digest: string; durable: boolean; updates: string }

/** The gradients of a step, the same in every run. The parameter `norm` has none in every third step. */
export function gradientsOf(step: number): (Float32Array | undefined)[] {
  return COUNTS.map((count, i) => (i === 5 && step % 3 === 0 ? undefined : normal(step * 100 + i, count)))
}

/** Takes a step with settings and an order of gradients of its own; `as` takes those, and the gradients, of another. */
export async function trainStep(client: RawClient, step: number, as = step): Promise<Trace> {
  client.updates.clear()
  const max_logits = { a: [as % 4 === 0 ? -Infinity : 5 + 3 * as, 8] }
  client.send({
    type: 'step',
    step,
    groups: { muon: { lr: 0.02 / as } },
    gradient_scale: 1 / (1 + (as % 2)),
    max_logits,
  })
  const gradients = gradientsOf(as)
  const skipped = [...gradients.keys()].filter((i) => gradients[i] === undefined)
  for (const [i, values] of gradients.entries()) if (values) client.gradient(i, step, { values })
  client.send({ type: 'end', step, skipped })
  return traceOf(client, await client.expect('receipt'))
}

export function traceOf(client: RawClient, { step, digest, durable }: ReceiptFrame): Trace {
  const hash = createHash('sha256')
  for (const index of [...client.updates.keys()].sort()) {
    const { data, scale, decay, row_scale } = client.updates.get(index)!
    hash.update(JSON.stringify([index, scale, decay])).update(data)
    if (row_scale) hash.update(row_scale)
  }
  return { step, digest, durable, updates: hash.digest('hex') }
}

/** Opens run `name` of MODEL, or opens it again, and takes its next steps up to `last`. */
export async function train(
  service: Service,
  { run = 'r', last, open = {} }: { run?: string; last: number; open?: Partial<OpenFrame> },
) {
  const client = await RawClient.connect(service.url)
  const opened = await client.open({ run, ...(open.mode === 'resume' ? {} : MODEL), ...open })
  const traces: Trace[] = []
  for (let step = opened.step + 1; step <= last; step++) {
    traces.push(await trainStep(client, step))
    // Waits for the checkpoint, as the next step would be over before it.
    if (service.data) await service.runs.keeper(run).settled()
  }
  return { client, opened, traces }
}

/** The traces of the steps 1 to `last` of an undisturbed run without a data folder. */
export async function undisturbed(service: Service, last: number): Promise<Trace[]> {
  const { client, traces } = await train(service, { run: 'undisturbed', last })
  await client.close()
  return traces
}

/** Traces without `durable`, which depends on the data folder. */
export const known = (traces: readonly Trace[]) => traces.map(({ durable: _, ...rest }) => rest)
