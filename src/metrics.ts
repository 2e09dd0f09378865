import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'

/** The parts of a step whose seconds a receipt has as well. */
export const PHASES = ['receive', 'queue', 'compute', 'send'] as const
export type Phase = (typeof PHASES)[number]

// From a bias on a warm machine (100 us) to a whole large model behind a slow network (100 s).
const PHASE_BUCKETS = [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]

// From a small run on a fast disk to a hundred gigabytes on a slow one.
const CHECKPOINT_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]

// QK-clip's usual threshold is 100; the logits of a model that explodes pass all buckets.
const LOGIT_BUCKETS = [1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 3000, 10_000]

export type Metrics = ReturnType<typeof createMetrics>

/** The values of the gauges. They are read at each scrape: no gauge has to be kept up to date. */
export type Observed = {
  in_flight_bytes: () => number
  staging: () => { used: number; capacity: number; own: number }
  state_bytes: () => number
  runs: () => number
  connections: () => number
  members: () => number
  sockets: () => Promise<number>
  unfinished_bytes: () => number
  build: { version: string; onnxruntime: string; device: string }
}

/**
 * Every metric of the service, in one registry; a field has the metric's name without `muond_`. `observe` adds the
 * gauges once there is something to show. No label names a run or a parameter, so the number of series is bounded.
 */
export function createMetrics(registry = new Registry()) {
  collectDefaultMetrics({ register: registry, prefix: 'muond_' })
  const counter = <Label extends string = never>(name: string, help: string, labelNames: readonly Label[] = []) =>
    new Counter<Label>({ name: `muond_${name}`, help, labelNames, registers: [registry] })
  return {
    registry,
    observe: (observed: Observed) => addGauges(registry, observed),
    steps_total: counter('steps_total', 'Steps finished with a receipt, replayed ones not counted.'),
    step_phase_seconds: phaseHistogram(registry),
    received_bytes_total: counter('received_bytes_total', 'Bytes of gradient data received.'),
    sent_bytes_total: counter('sent_bytes_total', 'Bytes of update data sent.'),
    transports_total: counter<'kind'>(
      'transports_total',
      'Streams that offered to share memory, by the transport that was taken; websocket is none of those offered.',
      ['kind'],
    ),
    refused_gradients_total: counter<'code'>('refused_gradients_total', 'Gradients refused, by error code.', ['code']),
    errors_total: counter<'code'>('errors_total', 'Errors told to clients on the stream or over REST, by code.', [
      'code',
    ]),
    clipped_heads_total: counter(
      'clipped_heads_total',
      'Query heads scaled by QK-clip, over all attentions and steps.',
    ),
    max_logit: new Histogram({
      name: 'muond_max_logit',
      help: 'The largest of the max_logits of each finished step that came with some, before QK-clip scales them.',
      buckets: LOGIT_BUCKETS,
      registers: [registry],
    }),
    checkpoint_seconds: new Histogram({
      name: 'muond_checkpoint_seconds',
      help: 'Seconds from the step of a checkpoint until it was on the disk.',
      buckets: CHECKPOINT_BUCKETS,
      registers: [registry],
    }),
    checkpoint_bytes_total: counter('checkpoint_bytes_total', 'Bytes of checkpoints written.'),
    journal_commit_seconds: new Histogram({
      name: 'muond_journal_commit_seconds',
      help: 'Seconds that the receipt of a step waited for the disk to have the step.',
      buckets: PHASE_BUCKETS,
      registers: [registry],
    }),
    member_wait_seconds_total: counter<'rank' | 'replica'>(
      'member_wait_seconds_total',
      'Seconds from the first end of a step until that of a rank: how long others waited for it. Ranks, and replicas, from 64 on are one.',
      ['rank', 'replica'],
    ),
    left_out_replicas_total: counter('left_out_replicas_total', 'Connected replicas that a step was closed without.'),
    lost_quorums_total: counter('lost_quorums_total', 'Deadlines of steps at which too few replicas had come.'),
    checkpoint_failures_total: counter('checkpoint_failures_total', 'Checkpoints that could not be written.'),
    refused_sockets_total: counter('refused_sockets_total', 'TCP connections closed over max_sockets.'),
    in_place_connections_total: counter(
      'in_place_connections_total',
      'Streams whose gradients the kernel writes straight into the staging arena.',
    ),
  }
}

function phaseHistogram(registry: Registry) {
  return new Histogram<'phase'>({
    name: 'muond_step_phase_seconds',
    help: 'Seconds of each finished step spent in a phase, summed over its parameters: receive, queue, compute, send.',
    labelNames: ['phase'],
    buckets: PHASE_BUCKETS,
    registers: [registry],
  })
}

function addGauges(registry: Registry, observed: Observed): void {
  const plain = {
    in_flight_bytes: 'Bytes of gradients received or computing and of updates not yet sent.',
    state_bytes: 'Bytes of optimizer state on the device.',
    runs: 'Runs in memory.',
    connections: 'Streams that are open.',
    members: 'Members of runs that have a connection, where a run has named members.',
    sockets: 'TCP connections, streams among them.',
    unfinished_bytes: 'Bytes that messages of more than 64 KiB take until they are handled, over all streams.',
  } as const
  for (const name of [
    'in_flight_bytes',
    'state_bytes',
    'runs',
    'connections',
    'members',
    'sockets',
    'unfinished_bytes',
  ] as const) {
    const read = observed[name]
    addGauge(registry, name, plain[name], async (gauge) => gauge.set(await read()))
  }
  addStaging(registry, observed.staging)
  const info = new Gauge({
    name: 'muond_build_info',
    help: 'Always 1; the labels say what runs.',
    labelNames: ['version', 'node', 'onnxruntime', 'device'],
    registers: [registry],
  })
  info.set({ ...observed.build, node: process.version }, 1)
}

function addGauge(registry: Registry, name: string, help: string, collect: (gauge: Gauge) => Promise<void>): void {
  new Gauge({
    name: `muond_${name}`,
    help,
    registers: [registry],
    collect() {
      return collect(this)
    },
  })
}

function addStaging(registry: Registry, read: Observed['staging']): void {
  new Gauge({
    name: 'muond_staging_bytes',
    help: 'Bytes of the staging arena, reserved (used) and in all (capacity), and of memory that runs have beside it (own).',
    labelNames: ['state'],
    registers: [registry],
    collect() {
      for (const [state, bytes] of Object.entries(read())) this.set({ state }, bytes)
    },
  })
}
