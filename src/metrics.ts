import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from 'prom-client'
import { ERRORS } from './errors.js'

/** The parts of a step whose seconds a receipt has as well. */
export const PHASES = ['receive', 'queue', 'compute', 'send'] as const
export type Phase = (typeof PHASES)[number]

// From a bias on a warm machine (100 us) to a whole large model behind a slow network (100 s).
const PHASE_BUCKETS = [1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]

// From a small run on a fast disk to a hundred gigabytes on a slow one.
const CHECKPOINT_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]

// QK-clip's usual threshold is 100; the logits of a model that explodes pass all buckets.
const LOGIT_BUCKETS = [1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 3000, 10_000]

// From an answer out of memory to the state of a large model.
const HTTP_BUCKETS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 60]

// From a gradient that vanishes to one that explodes.
const NORM_BUCKETS = [1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000, 10_000]

/** Gauges that prom-client names like counters; others of its gauges have the same values. */
const MISNAMED = ['active_resources_total', 'active_handles_total', 'active_requests_total'] as const

const TRANSPORTS = ['websocket', 'shm', 'cuda-ipc'] as const

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
  limits: Limits
  /** Undefined where no run is to have series of its own. */
  pulses: (() => Iterable<RunPulse>) | undefined
  build: { version: string; onnxruntime: string; device: string }
}

/** The most that there may be, by the name of the gauge that says how much there is. */
export type Limits = Readonly<Record<'runs' | 'connections' | 'sockets' | 'state_bytes' | 'unfinished_bytes', number>>

/** What the series of one run say; seconds since 1970, and undefined where nothing is known. */
export type RunPulse = {
  run: string
  step: number
  connected: boolean
  last_step_timestamp_seconds: number | undefined
  step_seconds: number | undefined
  gradient_norm: number | undefined
  update_rms: number | undefined
  max_logit: number | undefined
}

/**
 * Every metric of the service, in one registry; a field has the metric's name without `muond_`. `observe` adds the
 * gauges once there is something to show. No label names a parameter, and none a run unless the settings ask for that,
 * so the number of series is bounded. Series with labels begin at 0: a rate needs a value before the first event.
 */
export function createMetrics(registry = new Registry()) {
  collectDefaultMetrics({ register: registry, prefix: 'muond_' })
  for (const name of MISNAMED) registry.removeSingleMetric(`muond_nodejs_${name}`)
  const { counter, byCode, histogram } = instruments(registry)
  return {
    registry,
    observe: (observed: Observed) => addGauges(registry, observed),
    steps_total: counter('steps_total', 'Steps finished with a receipt, replayed ones not counted.'),
    step_phase_seconds: phaseHistogram(registry),
    received_bytes_total: counter('received_bytes_total', 'Bytes of gradient data received.'),
    sent_bytes_total: counter('sent_bytes_total', 'Bytes of update data sent.'),
    transports_total: transports(counter),
    refused_gradients_total: byCode('refused_gradients_total', 'Gradients refused, by error code.'),
    errors_total: byCode('errors_total', 'Errors told to clients on the stream or over REST, by code.'),
    replayed_updates_total: counter(
      'replayed_updates_total',
      'Updates computed again for a client that has sent a gradient again.',
    ),
    takeovers_total: counter('takeovers_total', 'Connections that lost their run to another one that has opened it.'),
    step_seconds: histogram(
      'step_seconds',
      'Wall-clock seconds of each finished step, from the end of the step before.',
      PHASE_BUCKETS,
    ),
    last_step_timestamp_seconds: new Gauge({
      name: 'muond_last_step_timestamp_seconds',
      help: 'When the last step of any run was finished, in seconds since 1970; 0 before the first.',
      registers: [registry],
    }),
    gradient_norm: histogram(
      'gradient_norm',
      'Global L2 norm of the gradients of each finished step, after gradient_scale.',
      NORM_BUCKETS,
    ),
    http_request_seconds: requestHistogram(registry),
    clipped_heads_total: counter(
      'clipped_heads_total',
      'Query heads scaled by QK-clip, over all attentions and steps.',
    ),
    max_logit: histogram(
      'max_logit',
      'The largest of the max_logits of each finished step that came with some, before QK-clip scales them.',
      LOGIT_BUCKETS,
    ),
    checkpoint_seconds: histogram(
      'checkpoint_seconds',
      'Seconds from the step of a checkpoint until it was on the disk.',
      CHECKPOINT_BUCKETS,
    ),
    checkpoint_bytes_total: counter('checkpoint_bytes_total', 'Bytes of checkpoints written.'),
    journal_commit_seconds: histogram(
      'journal_commit_seconds',
      'Seconds that the receipt of a step waited for the disk to have the step.',
      PHASE_BUCKETS,
    ),
    member_wait_seconds_total: memberWait(counter),
    left_out_replicas_total: counter('left_out_replicas_total', 'Connected replicas that a step was closed without.'),
    lost_quorums_total: counter('lost_quorums_total', 'Deadlines of steps at which too few replicas had come.'),
    checkpoint_failures_total: counter('checkpoint_failures_total', 'Checkpoints that could not be written.'),
    observeStore: storeObserver(registry, counter),
    refused_sockets_total: counter('refused_sockets_total', 'TCP connections closed over max_sockets.'),
    in_place_connections_total: counter(
      'in_place_connections_total',
      'Streams whose gradients the kernel writes straight into the staging arena.',
    ),
  }
}

/** Makes instruments of a registry from their names and help texts. `byCode` has a series of each error code. */
function instruments(registry: Registry) {
  const counter = <Label extends string = never>(name: string, help: string, labelNames: readonly Label[] = []) =>
    new Counter<Label>({ name: `muond_${name}`, help, labelNames, registers: [registry] })
  const byCode = (name: string, help: string) => {
    const counted = counter<'code'>(name, help, ['code'])
    for (const code of Object.keys(ERRORS)) counted.inc({ code }, 0)
    return counted
  }
  const histogram = (name: string, help: string, buckets: number[]) =>
    new Histogram({ name: `muond_${name}`, help, buckets, registers: [registry] })
  return { counter, byCode, histogram }
}

function transports(
  counter: (name: string, help: string, labels: readonly 'kind'[]) => Counter<'kind'>,
): Counter<'kind'> {
  const counted = counter(
    'transports_total',
    'Streams that offered to share memory, by the transport that was taken; websocket is none of those offered.',
    ['kind'],
  )
  for (const kind of TRANSPORTS) counted.inc({ kind }, 0)
  return counted
}

const STORE_OPERATIONS = ['get', 'put', 'upload', 'copy', 'list', 'delete'] as const

/** One request to a store of objects, with all its attempts; `bytes` are of content, sent or received. */
export type StoreSample = {
  readonly operation: (typeof STORE_OPERATIONS)[number]
  readonly seconds: number
  readonly bytes: number
  readonly failed: boolean
}

/** Counts the requests to a store of objects. */
function storeObserver(
  registry: Registry,
  counter: (name: string, help: string, labels: readonly 'operation'[]) => Counter<'operation'>,
): (sample: StoreSample) => void {
  const labels = ['operation'] as const
  const requests = counter('store_requests_total', 'Requests to the store of an s3:// data, by operation.', labels)
  const errors = counter('store_errors_total', 'Of those, the ones that failed after every attempt.', labels)
  const moved = counter('store_bytes_total', 'Bytes of content that they have sent or received.', labels)
  const seconds = new Histogram({
    name: 'muond_store_seconds',
    help: 'Seconds that they took, all attempts together.',
    labelNames: labels,
    buckets: HTTP_BUCKETS,
    registers: [registry],
  })
  for (const operation of STORE_OPERATIONS) for (const each of [requests, errors, moved]) each.inc({ operation }, 0)
  return ({ operation, seconds: taken, bytes, failed }) => {
    requests.inc({ operation })
    errors.inc({ operation }, Number(failed))
    moved.inc({ operation }, bytes)
    seconds.observe({ operation }, taken)
  }
}

function memberWait(
  counter: (name: string, help: string, labels: readonly ('rank' | 'replica')[]) => Counter<'rank' | 'replica'>,
): Counter<'rank' | 'replica'> {
  return counter(
    'member_wait_seconds_total',
    'Seconds from the first end of a step until that of a rank: how long others waited for it. Ranks, and replicas, from 64 on are one.',
    ['rank', 'replica'],
  )
}

/** The route is one of the contract's, or `none`: what clients ask for is no label. */
function requestHistogram(registry: Registry) {
  return new Histogram<'method' | 'route' | 'status'>({
    name: 'muond_http_request_seconds',
    help: 'Seconds from a request to the end of its answer, by method, route and status; event streams and WebSockets are not in it.',
    labelNames: ['method', 'route', 'status'],
    buckets: HTTP_BUCKETS,
    registers: [registry],
  })
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
  addLimits(registry, observed.limits)
  if (observed.pulses) addPulses(registry, observed.pulses)
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

const LIMITS: Readonly<Record<keyof Limits, string>> = {
  runs: 'Most runs in memory.',
  connections: 'Most streams that may be open.',
  sockets: 'Most TCP connections, streams among them.',
  state_bytes: 'Most bytes of optimizer state and what computing it needs, over all runs.',
  unfinished_bytes: 'Most bytes that unfinished messages may take, over all streams.',
}

function addLimits(registry: Registry, limits: Limits): void {
  for (const [name, help] of Object.entries(LIMITS))
    new Gauge({ name: `muond_${name}_limit`, help, registers: [registry] }).set(Reflect.get(limits, name))
}

const PULSES: Readonly<Record<Exclude<keyof RunPulse, 'run'>, string>> = {
  step: 'The last finished step of a run.',
  connected: 'Whether a connection has a run: 1 or 0.',
  last_step_timestamp_seconds: 'When this process finished the last step of a run, in seconds since 1970.',
  step_seconds: 'Wall-clock seconds of the newest steps of a run, the mean of at most 20.',
  gradient_norm: 'Global L2 norm of the gradients of the last step of a run.',
  update_rms: 'Root of the mean square of the updates of the last step of a run.',
  max_logit: 'The largest of the max_logits of the last step of a run.',
}

/** Series of each run in memory, made anew at each scrape: those of a run that has left are gone. */
function addPulses(registry: Registry, read: () => Iterable<RunPulse>): void {
  for (const [name, help] of Object.entries(PULSES)) {
    new Gauge({
      name: `muond_run_${name}`,
      help,
      labelNames: ['run'],
      registers: [registry],
      collect() {
        this.reset()
        for (const { run, ...values } of read()) {
          const value: number | boolean | undefined = Reflect.get(values, name)
          if (value !== undefined) this.set({ run }, Number(value))
        }
      },
    })
  }
}
