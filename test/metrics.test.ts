import { Registry } from 'prom-client'
import t from 'tap'
import { ERRORS } from '../src/errors.js'
import { createMetrics, PHASES } from '../src/metrics.js'

function observed() {
  const now = { in_flight: 1, used: 2, state: 3, runs: 4, connections: 5, sockets: 6, unfinished: 7 }
  const observed = {
    in_flight_bytes: () => now.in_flight,
    staging: () => ({ used: now.used, capacity: 1000, own: 500 }),
    state_bytes: () => now.state,
    runs: () => now.runs,
    connections: () => now.connections,
    members: () => 2,
    sockets: async () => now.sockets,
    unfinished_bytes: () => now.unfinished,
    limits: { runs: 64, connections: 256, sockets: 1024, state_bytes: 1e9, unfinished_bytes: 1e6 },
    pulses: undefined,
    build: { version: '1.2.3', onnxruntime: '1.30.0', device: 'cpu' },
  }
  return { now, observed }
}

t.test('every instrument has the prefix, a help text and a base unit', async (t) => {
  const metrics = createMetrics()
  metrics.observe(observed().observed)
  for (const { name, help } of await metrics.registry.getMetricsAsJSON()) {
    t.match(name, /^muond_/)
    t.ok(help.length > 5, name)
    t.notMatch(name, /_(ms|milliseconds|kb|mb|kilobytes)\b/, name)
  }
})

t.test('gauges show what is so at the scrape', async (t) => {
  const metrics = createMetrics()
  const { now, observed: sources } = observed()
  metrics.observe(sources)
  const values = async () =>
    (await metrics.registry.metrics())
      .split('\n')
      .filter((line) => /^muond_(in_flight_bytes|staging_bytes|state_bytes|runs|connections)\b/.test(line))
  const before = [
    'in_flight_bytes 1',
    'state_bytes 3',
    'runs 4',
    'connections 5',
    'staging_bytes{state="used"} 2',
    'staging_bytes{state="capacity"} 1000',
    'staging_bytes{state="own"} 500',
  ]
  t.same(
    await values(),
    before.map((line) => `muond_${line}`),
  )
  Object.assign(now, { used: 7, runs: 0 })
  const after = await values()
  t.ok(after.includes('muond_staging_bytes{state="used"} 7'))
  t.ok(after.includes('muond_runs 0'))
})

t.test('build_info says what runs', async (t) => {
  const metrics = createMetrics()
  metrics.observe(observed().observed)
  const text = await metrics.registry.getSingleMetricAsString('muond_build_info')
  for (const label of ['version="1.2.3"', `node="${process.version}"`, 'onnxruntime="1.30.0"', 'device="cpu"'])
    t.ok(text.includes(label), label)
})

t.test('counters and phases are counted by their labels', async (t) => {
  const metrics = createMetrics()
  metrics.steps_total.inc()
  metrics.received_bytes_total.inc(10)
  metrics.sent_bytes_total.inc(20)
  metrics.in_place_connections_total.inc()
  metrics.clipped_heads_total.inc(3)
  for (const largest of [-2, 100, 250]) metrics.max_logit.observe(largest)
  metrics.refused_gradients_total.inc({ code: 'SHAPE_MISMATCH' })
  metrics.errors_total.inc({ code: 'RUN_BUSY' })
  for (const phase of PHASES) metrics.step_phase_seconds.observe({ phase }, 0.02)
  const text = await metrics.registry.metrics()
  const lines = [
    'muond_steps_total 1',
    'muond_received_bytes_total 10',
    'muond_sent_bytes_total 20',
    'muond_in_place_connections_total 1',
    'muond_clipped_heads_total 3',
    'muond_max_logit_bucket{le="100"} 2',
    'muond_max_logit_count 3',
    'muond_refused_gradients_total{code="SHAPE_MISMATCH"} 1',
    'muond_errors_total{code="RUN_BUSY"} 1',
    ...PHASES.map((phase) => `muond_step_phase_seconds_count{phase="${phase}"} 1`),
    'muond_step_phase_seconds_bucket{le="0.01",phase="queue"} 0',
    'muond_step_phase_seconds_bucket{le="0.03",phase="queue"} 1',
  ]
  for (const line of lines) t.ok(text.split('\n').includes(line), line)
})

t.test('the delay of the event loop is among the metrics', async (t) => {
  t.match(await createMetrics().registry.metrics(), /^muond_nodejs_eventloop_lag_p99_seconds /m)
})

t.test('two services in one process have registries of their own, or one that is given', async (t) => {
  const registry = new Registry()
  t.equal(createMetrics(registry).registry, registry)
  t.not(createMetrics().registry, createMetrics().registry)
})

t.test('what is counted by a label begins at 0, and every limit is a gauge', async (t) => {
  const metrics = createMetrics()
  metrics.observe(observed().observed)
  const lines = (await metrics.registry.metrics()).split('\n')
  for (const code of Object.keys(ERRORS))
    for (const name of ['errors', 'refused_gradients'])
      t.ok(lines.includes(`muond_${name}_total{code="${code}"} 0`), `${name} ${code}`)
  for (const kind of ['websocket', 'shm', 'cuda-ipc'])
    t.ok(lines.includes(`muond_transports_total{kind="${kind}"} 0`), kind)
  for (const limit of ['runs_limit 64', 'connections_limit 256', 'sockets_limit 1024', 'state_bytes_limit 1000000000'])
    t.ok(lines.includes(`muond_${limit}`), limit)
  t.notMatch(lines.join('\n'), /^muond_run_/m, 'no run has series of its own unless the settings say so')
})

t.test('runs that are to have series of their own have them as long as they are there', async (t) => {
  const metrics = createMetrics()
  const pulse = { step: 7, connected: true, gradient_norm: 2.5, max_logit: undefined, update_rms: 0.2 }
  const times = { last_step_timestamp_seconds: 1.7e9, step_seconds: 0.25 }
  let pulses = [{ run: 'a', ...pulse, ...times }]
  metrics.observe({ ...observed().observed, pulses: () => pulses })
  const series = async () =>
    (await metrics.registry.metrics()).split('\n').filter((line) => line.startsWith('muond_run_'))
  t.same(await series(), [
    'muond_run_step{run="a"} 7',
    'muond_run_connected{run="a"} 1',
    'muond_run_last_step_timestamp_seconds{run="a"} 1700000000',
    'muond_run_step_seconds{run="a"} 0.25',
    'muond_run_gradient_norm{run="a"} 2.5',
    'muond_run_update_rms{run="a"} 0.2',
  ])
  pulses = []
  t.same(await series(), [])
})
