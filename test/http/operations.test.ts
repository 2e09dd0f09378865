import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import t from 'tap'
import { WebSocket } from 'ws'
import { VERSION } from '../../src/config.js'
import { readContract } from '../../src/http/contract.js'
import type { components } from '../../src/http/openapi.js'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { connect, GRADIENTS, MODEL, openRun, startService } from './service.js'

type Schemas = components['schemas']

async function get<Body = unknown>(url: string): Promise<Body> {
  const response = await fetch(url)
  t.equal(response.status, 200, url)
  return (await response.json()) as Body
}

async function state(url: string) {
  const response = await fetch(url)
  const bytes = new Uint8Array(await response.arrayBuffer())
  const { metadata, tensors } = parseSafetensors(bytes)
  const values = [...tensors].map(([name, { dtype, shape, data }]) => {
    const copy = data.slice().buffer
    return [
      name,
      {
        dtype,
        shape,
        values: dtype === 'I64' ? [...new BigInt64Array(copy)].map(Number) : [...new Float32Array(copy)],
      },
    ]
  })
  return { response, bytes, metadata, tensors: Object.fromEntries(values) }
}

t.test(
  'the contract lists what the service answers, and each query parameter is required or has a default',
  async (t) => {
    const { document } = readContract()
    const { app } = await startService(t)
    for (const [path, { parameters: _, ...operations }] of Object.entries(document.paths)) {
      const url = path.replace(/{(\w+)}/g, ':$1')
      for (const [method, operation] of Object.entries(operations)) {
        t.ok(app.hasRoute({ method: method.toUpperCase() as 'GET', url }), `${method} ${path}`)
        for (const parameter of operation.parameters ?? []) {
          if ('in' in parameter && parameter.in === 'query')
            t.ok(parameter.required || 'default' in parameter.schema, `${path} ${JSON.stringify(parameter)}`)
        }
      }
    }
  },
)

t.test('livez, readyz, the contract, its page and the metrics are there', async (t) => {
  const { url } = await startService(t)
  t.same(await get(`${url}/livez`), { status: 'ok' })
  t.same(await get(`${url}/readyz`), { status: 'ok' })
  const contract = await fetch(`${url}/openapi.yaml`)
  t.equal(contract.headers.get('content-type'), 'application/yaml')
  t.equal(await contract.text(), readContract().text)
  const frames = await fetch(`${url}/asyncapi.yaml`)
  t.equal(await frames.text(), readFileSync('asyncapi.yaml', 'utf8'))
  const metrics = await fetch(`${url}/metrics`)
  t.match(metrics.headers.get('content-type'), /^text\/plain; version=0\.0\.4/)
  t.match(await metrics.text(), /^muond_build_info\{.*device="cpu".*\} 1$/m)
})

t.test('the page under /docs needs nothing from outside the service', async (t) => {
  const { url } = await startService(t)
  const page = await fetch(`${url}/docs`)
  t.match(page.headers.get('content-security-policy'), /default-src 'self'/)
  const html = await page.text()
  const sources = [...html.matchAll(/(?:src|href)="([^"]+)"/g)].map(([, source]) => source ?? '')
  t.ok(sources.length >= 5)
  for (const source of sources) {
    const response = await fetch(new URL(source, `${url}/docs`))
    t.equal(response.status, 200, source)
    t.ok(response.url.startsWith(url), source)
    await response.arrayBuffer()
  }
  t.same((await get<{ info: object }>(`${url}/docs/json`)).info, readContract().document.info)
})

t.test('readyz says why no step is accepted', async (t) => {
  const { url, runs, device } = await startService(t)
  runs.draining = true
  const draining = await fetch(`${url}/readyz`)
  t.match([draining.status, await draining.json()], [503, { code: 'DRAINING', retryable: true }])
  device.failed = new Error('out of order')
  const failed = await fetch(`${url}/readyz`)
  t.match(
    [failed.status, await failed.json()],
    [503, { code: 'DEVICE_FAILED', detail: /cpu has failed: out of order/ }],
  )
  t.equal((await fetch(`${url}/livez`)).status, 200)
})

t.test('capabilities are the settings, the tables and the device', async (t) => {
  const { url, device } = await startService(t, { max_runs: 7, chunk_bytes: 1000, state_bytes_limit: 123_456 })
  const capabilities = await get<Schemas['Capabilities']>(`${url}/v1/capabilities`)
  t.match(capabilities, {
    server: { name: 'muond', version: VERSION },
    protocols: [1],
    dtypes: ['float32', 'bfloat16', 'float16', 'int8_block256', 'int4_block64'],
    devices: [{ name: 'cpu', kind: 'cpu', onnxruntime: device.backend.version, lanes: 1 }],
    limits: {
      max_runs: 7,
      chunk_bytes: 1000,
      state_bytes: 123_456,
      staging_bytes: 2 ** 20,
      max_connections: 256,
      max_bytes_per_second: 0,
    },
    quotas: { runs: { used: 0 }, parameters: { used: 0 }, state_bytes: { used: 0 }, connections: { used: 0 } },
  })
  t.same(Object.keys(capabilities.algorithms), ['muon', 'adamw', 'adam', 'rmsprop', 'sgd', 'muonclip'])
  t.match(capabilities.algorithms.muon.momentum, { default: 0.95, sticky: true })
  t.match(capabilities.algorithms.adamw.betas, { default: [0.9, 0.999] })
  t.same(Object.keys(capabilities.presets), [
    'deepseek-v4',
    'diloco',
    'kimi-k2',
    'moonlight',
    'muloco',
    'nanogpt',
    'torch',
  ])
  t.match(capabilities.presets['deepseek-v4'], {
    description: /^DeepSeek-V4/,
    source: /arXiv/,
    algorithm: 'muon',
    hyperparameters: { adamw: { eps: { value: 1e-20, source: 'section 4.2.2', confirmed: true } } },
  })
  t.same(Object.keys(capabilities.algorithms.sgd.lr), ['default', 'expected', 'description', 'sticky'])
})

t.test('a run is described, and its step and digest are those of its receipts', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  const fresh = await get<Schemas['Run']>(`${url}/v1/runs/a`)
  t.match(fresh, { name: 'a', epoch: 1, step: 0, connected: true, parameters: 3, state_bytes: 0, ahead: [] })
  t.match(fresh.groups.hidden, { algorithm: 'muon', momentum_form: 'heavy_ball', lr: 1e-3 })
  const receipt = await trainer.step(1, GRADIENTS)
  const stepped = await get<Schemas['Run']>(`${url}/v1/runs/a`)
  t.match(stepped, { step: 1, digest: receipt.digest, state_bytes: 4 * (6 + 3 + 3 + 4) })
  t.ok(Date.now() - Date.parse(stepped.created_at) < 60_000)
  const { ahead, attentions, groups, ...summary } = stepped
  t.same(attentions, [])
  t.same(await get(`${url}/v1/runs`), { runs: [summary], stored: [] })
  trainer.socket.close()
})

t.test('parameters are listed page by page', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  const all = await get<{ parameters: Schemas['ParameterSummary'][]; total: number }>(`${url}/v1/runs/a/parameters`)
  t.equal(all.total, 3)
  const [{ last, ...first }] = all.parameters as [Schemas['ParameterSummary']]
  t.match(last, { gradient_norm: Math.sqrt(91), update_rms: Number })
  t.same(first, {
    index: 0,
    name: 'w',
    shape: [2, 3],
    group: 'hidden',
    algorithm: 'muon',
    gradient_dtype: 'float32',
    update_dtype: 'float32',
    split: [1, 1],
    updates: 1,
    state_bytes: 24,
    plan: {
      blocks: [{ count: 2, rows: 1, cols: 3, factor: 1 }],
      decay: 1e-3 * 0.1,
      state_bytes: 24,
      flops: 218,
      why: "group 'hidden' asks for muon: its rows are 2 fused matrices",
    },
  })
  t.match(all.parameters[1]?.plan, { blocks: [], why: /asks for adamw: each element for itself$/ })
  t.same(await get(`${url}/v1/runs/a/parameters?offset=1&limit=1`), { parameters: [all.parameters[1]], total: 3 })
  t.same(await get(`${url}/v1/runs/a/parameters?offset=9`), { parameters: [], total: 3 })
  trainer.socket.close()
})

t.test(
  'what the last step of each parameter came to is what its update said, and the run says how fast it goes',
  async (t) => {
    const { url } = await startService(t)
    const trainer = await openRun(url, 'a')
    const summary = () => get<Schemas['Run']>(`${url}/v1/runs/a`)
    t.notMatch(await summary(), { step_seconds: Number })
    trainer.sendStep(1, GRADIENTS)
    const updates = [await trainer.next('update'), await trainer.next('update'), await trainer.next('update')]
    await trainer.next('receipt')
    const { parameters } = await get<{ parameters: Schemas['ParameterSummary'][] }>(`${url}/v1/runs/a/parameters`)
    for (const { parameter, gradient_norm, update_rms } of updates)
      t.same(parameters[parameter]?.last, { gradient_norm, update_rms })
    const { receipts } = await get<{ receipts: Schemas['Receipt'][] }>(`${url}/v1/runs/a/receipts`)
    const square = updates.reduce(
      (sum, { parameter, update_rms = 0 }) => sum + update_rms ** 2 * GRADIENTS[parameter]!.length,
      0,
    )
    t.ok(Math.abs(receipts[0]!.measured!.update_rms - Math.sqrt(square / 13)) < 1e-12)
    await trainer.step(2, GRADIENTS)
    const { last_step_at, step_seconds } = await summary()
    const [one, two] = (await get<{ receipts: Schemas['Receipt'][] }>(`${url}/v1/runs/a/receipts`)).receipts
    t.equal(last_step_at, two!.measured!.finished_at)
    t.equal(step_seconds, (one!.measured!.wall_seconds + two!.measured!.wall_seconds) / 2)
    t.ok(Date.parse(one!.measured!.finished_at) <= Date.parse(two!.measured!.finished_at))
    trainer.socket.close()
  },
)

t.test('a parameter shows the norms of its state', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  t.match(await get(`${url}/v1/runs/a/parameters/2`), { updates: 0, state: [] })
  await trainer.step(1, GRADIENTS)
  const { state } = await get<Schemas['Parameter']>(`${url}/v1/runs/a/parameters/2`)
  t.same(state, [{ name: 'momentum_buffer', dtype: 'float32', shape: [4], norm: 5, rms: 2.5 }])
  const missing = await fetch(`${url}/v1/runs/a/parameters/3`)
  t.match([missing.status, await missing.json()], [404, { code: 'PARAMETER_UNKNOWN', parameter: 3 }])
  trainer.socket.close()
})

t.test('the state of a parameter is a safetensors body under the names of torch', async (t) => {
  const { url, device } = await startService(t)
  const trainer = await openRun(url, 'a')
  const before = await state(`${url}/v1/runs/a/parameters/1/state`)
  t.match(before, { tensors: {}, metadata: { run: 'a', parameter: 'b', algorithm: 'adamw', run_step: '0' } })
  await trainer.step(1, GRADIENTS)
  const [muon, adamw, sgd] = await Promise.all(
    [0, 1, 2].map((index) => state(`${url}/v1/runs/a/parameters/${index}/state`)),
  )
  t.equal(adamw?.response.headers.get('content-type'), 'application/octet-stream')
  t.equal(adamw?.response.headers.get('content-length'), String(adamw?.bytes.length))
  t.same(muon?.tensors, {
    step: { dtype: 'I64', shape: [], values: [1] },
    momentum_buffer: { dtype: 'F32', shape: [2, 3], values: [1, 2, 3, 4, 5, 6] },
  })
  t.match(muon?.metadata, { algorithm: 'muon', momentum_form: 'heavy_ball', run_step: '1' })
  t.same(Object.keys(adamw?.tensors ?? {}), ['step', 'exp_avg', 'exp_avg_sq'])
  for (const [i, g] of (GRADIENTS[1] ?? []).entries()) {
    t.ok(Math.abs(adamw?.tensors.exp_avg.values[i] - 0.1 * g) < 1e-6)
    t.ok(Math.abs(adamw?.tensors.exp_avg_sq.values[i] - 0.001 * g * g) < 1e-6)
  }
  t.same(sgd?.tensors.momentum_buffer.values, [3, 0, 4, 0])
  await trainer.step(2, GRADIENTS)
  t.same(
    (await state(`${url}/v1/runs/a/parameters/2/state`)).tensors.momentum_buffer.values,
    [5.7, 0, 7.6, 0].map(Math.fround),
  )
  t.equal(device.memory.bytes, 4 * (6 + 3 + 3 + 4), 'reading keeps no state alive')
  trainer.socket.close()
})

t.test('receipts after a step, the newest of them kept', async (t) => {
  const { url } = await startService(t, { receipts_kept: 2 })
  const trainer = await openRun(url, 'a')
  const told = []
  for (const step of [1, 2, 3]) told.push(await trainer.step(step, GRADIENTS))
  const bodies = told.map(({ type, ...body }) => body)
  const receipts = async (query = '') => {
    const { receipts } = await get<{ receipts: Schemas['Receipt'][] }>(`${url}/v1/runs/a/receipts${query}`)
    return receipts.map(({ measured, ...body }) => body)
  }
  t.same(await receipts(), bodies.slice(1))
  t.same(await receipts('?after=2'), bodies.slice(2))
  t.same(await receipts('?after=3'), [])
  trainer.socket.close()
})

t.test('requests are measured by route, unknown ones as one, and replays and takeovers are counted', async (t) => {
  const { url } = await startService(t, { run_metrics: 'true' })
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  trainer.sendStep(1, GRADIENTS)
  await trainer.next('receipt')
  const heir = await connect(url)
  heir.send({ type: 'open', protocol: 1, run: 'a', takeover: true, ...MODEL })
  await heir.next('opened')
  await fetch(`${url}/v1/runs/a`)
  await fetch(`${url}/v1/runs/b`)
  for (const path of ['/one', '/two']) await fetch(`${url}${path}`)
  const events = new AbortController()
  await fetch(`${url}/v1/runs/a/events`, { signal: events.signal })
  events.abort()
  const text = await (await fetch(`${url}/metrics`)).text()
  const counted = (labels: string) => `muond_http_request_seconds_count{${labels}}`
  for (const line of [
    'muond_replayed_updates_total 3',
    'muond_takeovers_total 1',
    'muond_step_seconds_count 1',
    'muond_gradient_norm_count 1',
    'muond_run_step{run="a"} 1',
    `${counted('method="GET",route="/v1/runs/:run",status="200"')} 1`,
    `${counted('method="GET",route="/v1/runs/:run",status="404"')} 1`,
    `${counted('method="GET",route="none",status="404"')} 2`,
  ])
    t.ok(text.split('\n').includes(line), line)
  t.notMatch(text, /route="[^"]*(events|stream)"/)
  t.ok(Date.now() / 1000 - Number(/^muond_last_step_timestamp_seconds (.*)$/m.exec(text)?.[1]) < 60)
  heir.socket.close()
})

t.test('a deleted run is gone with its state, and its connection is told', async (t) => {
  const { url, device } = await startService(t)
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  const closed = once(trainer.socket, 'close')
  const response = await fetch(`${url}/v1/runs/a`, { method: 'DELETE' })
  t.equal(response.status, 204)
  t.match(await trainer.next('error'), { code: 'RUN_NOT_FOUND' })
  t.equal((await closed)[0], 1008)
  t.same(await get(`${url}/v1/runs`), { runs: [], stored: [] })
  t.equal(device.memory.bytes, 0)
})

t.test('more streams than max_connections are refused at the upgrade, and a closed one makes room', async (t) => {
  const { url, app } = await startService(t, { max_connections: 1 })
  const first = await connect(url)
  const second = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`)
  second.on('error', () => {})
  const [, response] = await once(second, 'unexpected-response')
  t.match(response, { statusCode: 429, headers: { 'retry-after': '1', 'content-type': 'application/problem+json' } })
  response.resume()
  second.terminate()
  const [server] = app.websocketServer.clients
  const closed = once(server ?? first.socket, 'close')
  first.socket.close()
  await closed
  const third = await connect(url)
  t.equal(third.socket.readyState, WebSocket.OPEN)
  third.socket.close()
})

t.test('draining lets the step in flight end, takes no stream, and closes with 1012', async (t) => {
  const { url, drain } = await startService(t, { drain_seconds: 20 })
  const trainer = await openRun(url, 'a')
  const idle = await openRun(url, 'b')
  const closes = [trainer, idle].map(({ socket }) => once(socket, 'close'))
  trainer.sendStep(1, GRADIENTS.slice(0, 1))
  await trainer.next('error')
  const drained = drain()
  t.match(await trainer.next('draining'), { deadline_seconds: 20 })
  const refused = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`)
  refused.on('error', () => {})
  const [, response] = await once(refused, 'unexpected-response')
  t.match(
    [response.statusCode, JSON.parse(Buffer.concat(await response.toArray()).toString())],
    [503, { code: 'DRAINING' }],
  )
  refused.terminate()
  t.match(await trainer.step(1, GRADIENTS), { step: 1, applied: 3 })
  t.same(
    (await Promise.all(closes)).map(([code]) => code),
    [1012, 1012],
  )
  await drained
})

t.test('a step that does not end is cut off at the deadline', async (t) => {
  const { url, drain } = await startService(t, { drain_seconds: 0.05 })
  const trainer = await openRun(url, 'a')
  trainer.sendStep(1, GRADIENTS.slice(0, 1))
  await trainer.next('error')
  const closed = once(trainer.socket, 'close')
  await drain()
  t.equal((await closed)[0], 1012)
})

t.test('a peer that does not answer the close frame is cut off', async (t) => {
  const { url, app } = await startService(t)
  const trainer = await openRun(url, 'a')
  trainer.socket.pause()
  await app.close()
  t.equal(app.websocketServer.clients.size, 0)
  trainer.socket.terminate()
})

t.test('a message over the limit closes its stream with 1009 and is counted', async (t) => {
  const { url, metrics } = await startService(t)
  const trainer = await openRun(url, 'a')
  const closed = once(trainer.socket, 'close')
  trainer.socket.send(Buffer.alloc(17 * 2 ** 20))
  t.equal((await closed)[0], 1009)
  const { values } = await metrics.errors_total.get()
  t.match(
    values.filter(({ value }) => value > 0),
    [{ labels: { code: 'FRAME_TOO_LARGE' }, value: 1 }],
  )
})

t.test('metrics count the step, its bytes and its phases', async (t) => {
  const { url } = await startService(t)
  const trainer = await openRun(url, 'a')
  await trainer.step(1, GRADIENTS)
  const text = await (await fetch(`${url}/metrics`)).text()
  const bytes = GRADIENTS.reduce((sum, gradient) => sum + gradient.byteLength, 0)
  const lines = [
    'muond_steps_total 1',
    `muond_received_bytes_total ${bytes}`,
    `muond_sent_bytes_total ${bytes}`,
    'muond_runs 1',
    'muond_connections 1',
    'muond_in_flight_bytes 0',
    'muond_staging_bytes{state="used"} 0',
    'muond_in_place_connections_total 1',
    'muond_step_phase_seconds_count{phase="compute"} 1',
  ]
  for (const line of lines) t.ok(text.split('\n').includes(line), line)
  t.equal(MODEL.parameters.length, 3)
  trainer.socket.close()
})
