import { once } from 'node:events'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { buildApp } from '../src/app.js'
import { configOf } from '../src/config.js'
import { startTracing, type Tracing } from '../src/tracing.js'
import { normal, RawClient } from './service.js'

type Fields = Map<number, (bigint | Buffer)[]>
type Span = { trace: string; id: string; parent: string; name: string; kind: number; start: bigint; end: bigint }

/** The fields of a protobuf message by number. */
function fieldsOf(bytes: Buffer): Fields {
  const fields: Fields = new Map()
  let at = 0
  const varint = () => {
    let value = 0n
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++]!
      value |= BigInt(byte & 127) << shift
      if (byte < 128) return value
    }
  }
  const take = (length: number) => {
    at += length
    return bytes.subarray(at - length, at)
  }
  while (at < bytes.length) {
    const key = Number(varint())
    const values = fields.get(key >> 3) ?? []
    fields.set(key >> 3, values)
    if ((key & 7) === 0) values.push(varint())
    else if ((key & 7) === 1) values.push(take(8).readBigUInt64LE())
    else values.push(take((key & 7) === 5 ? 4 : Number(varint())))
  }
  return fields
}

const messages = (fields: Fields, number: number) =>
  (fields.get(number) ?? []).map((bytes) => fieldsOf(bytes as Buffer))
const hex = (fields: Fields, number: number) => ((fields.get(number)?.[0] ?? Buffer.alloc(0)) as Buffer).toString('hex')

/** Spans of an ExportTraceServiceRequest of opentelemetry-proto. */
function spansOf(body: Buffer): Span[] {
  const scopes = messages(fieldsOf(body), 1).flatMap((resource) => messages(resource, 2))
  return scopes.flatMap((scope) =>
    messages(scope, 2).map((span) => ({
      ...{ trace: hex(span, 1), id: hex(span, 2), parent: hex(span, 4), name: String(span.get(5)![0]) },
      ...{ kind: Number(span.get(6)![0]), start: span.get(7)![0] as bigint, end: span.get(8)![0] as bigint },
    })),
  )
}

/** A collector for the variables of one process, and what it was sent. */
async function startCollector() {
  const bodies: Buffer[] = []
  const paths: string[] = []
  const server = createServer(async (request, response) => {
    const pieces: Buffer[] = []
    for await (const piece of request) pieces.push(piece)
    bodies.push(Buffer.concat(pieces))
    paths.push(`${request.method} ${request.url}`)
    response.end()
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  return { url: `http://127.0.0.1:${port}`, bodies, paths, close: () => server.close() }
}

async function startTraced(tracing: Tracing | undefined, settings: Parameters<typeof configOf>[0] = {}) {
  const config = configOf({ device: 'cpu', port: 0, lanes: 1, staging_bytes: 2 ** 20, ...settings })
  const built = await buildApp({ config, tracing })
  const url = await built.app.listen({ host: '127.0.0.1', port: 0 })
  return { ...built, url: `${url.replace('http', 'ws')}/v1/stream` }
}

const TRACE = '0af7651916cd43dd8448eb211c80319c'
const TRAINER = 'b7ad6b7169203331'
const OPEN = {
  run: 'traced',
  groups: [{ name: 'all', algorithm: 'sgd' }],
  parameters: [
    { name: 'a', shape: [4], group: 'all' },
    { name: 'b', shape: [4], group: 'all' },
  ],
}
const GRADIENTS = [normal(1, 4), normal(2, 4)]

t.test('each step is a span below that of the trainer, with a child for each phase', async (t) => {
  const collector = await startCollector()
  process.env.OTEL_EXPORTER_OTLP_ENDPOINT = collector.url
  process.env.OTEL_RESOURCE_ATTRIBUTES = 'deployment.environment=test'
  t.teardown(() => {
    delete process.env.OTEL_EXPORTER_OTLP_ENDPOINT
    delete process.env.OTEL_RESOURCE_ATTRIBUTES
  })
  const service = await startTraced(await startTracing(process.env, '1.2.3'), {
    ...{ data: t.testdir(), durability: 'journal' },
  })
  const client = await RawClient.connect(service.url)
  await client.open(OPEN)
  const before = BigInt(Date.now()) * 1_000_000n
  client.send({ type: 'step', step: 1, traceparent: `00-${TRACE}-${TRAINER}-01` })
  // Sent again after a lost connection it may be below another span: the newest counts.
  client.send({ type: 'step', step: 1, traceparent: `00-${TRACE}-${TRAINER}-01` })
  await client.step(1, GRADIENTS)
  await client.step(2, GRADIENTS)
  await client.close()
  await service.app.close()
  collector.close()
  t.same([...new Set(collector.paths)], ['POST /v1/traces'])
  const text = Buffer.concat(collector.bodies).toString('latin1')
  for (const word of ['muond', '1.2.3', 'deployment.environment', 'muond.gradient_norm', 'traced'])
    t.ok(text.includes(word), word)
  const spans = collector.bodies.flatMap(spansOf)
  const steps = spans.filter(({ name }) => name === 'muond.step')
  t.match(steps, [{ trace: TRACE, parent: TRAINER, kind: 2 }, { parent: '' }])
  t.not(steps[1]!.trace, TRACE)
  for (const step of steps) {
    const children = spans.filter(({ parent }) => parent === step.id)
    t.same(
      new Set(children.map(({ name }) => name)),
      new Set(['receive', 'queue', 'compute', 'send', 'commit'].map((name) => `muond.${name}`)),
    )
    t.equal(children.length, 5)
    for (const child of children) {
      t.ok(child.trace === step.trace && child.kind === 1, child.name)
      t.ok(child.start <= child.end && child.end <= step.end && step.start < step.end, child.name)
    }
    t.ok(
      before <= step.start + 1_000_000_000n && step.end <= BigInt(Date.now() + 1000) * 1_000_000n,
      'by the clock on the wall',
    )
  }
})

t.test('a run without a journal has no commit, and a step that skips everything has no phases', async (t) => {
  const collector = await startCollector()
  process.env.OTEL_EXPORTER_OTLP_TRACES_ENDPOINT = `${collector.url}/traces`
  t.teardown(() => {
    delete process.env.OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
  })
  const service = await startTraced(await startTracing(process.env, '1'))
  const client = await RawClient.connect(service.url)
  await client.open(OPEN)
  client.send({ type: 'end', step: 1, skipped: [0, 1] })
  await client.expect('receipt')
  await client.step(2, GRADIENTS)
  await client.close()
  await service.app.close()
  collector.close()
  t.same([...new Set(collector.paths)], ['POST /traces'])
  const names = collector.bodies.flatMap(spansOf).map(({ name }) => name)
  t.same(
    names.sort(),
    ['compute', 'queue', 'receive', 'send', 'step', 'step'].map((name) => `muond.${name}`),
  )
})

t.test('without the variables nothing is traced, and nothing of OpenTelemetry is loaded', async (t) => {
  t.equal(await startTracing({}, '1'), undefined)
  t.equal(await startTracing({ OTEL_EXPORTER_OTLP_ENDPOINT: 'http://x', OTEL_SDK_DISABLED: 'true' }, '1'), undefined)
  const service = await startTraced(undefined)
  const client = await RawClient.connect(service.url)
  await client.open(OPEN)
  client.send({ type: 'step', step: 1, traceparent: `00-${TRACE}-${TRAINER}-01` })
  t.match(await client.step(1, GRADIENTS), { step: 1 })
  await client.close()
  await service.app.close()
})

t.test('a traceparent that is none ends the connection with the pattern', async (t) => {
  const service = await startTraced(undefined)
  for (const traceparent of [
    '',
    `00-${TRACE}-${TRAINER}`,
    `01-${TRACE}-${TRAINER}-01`,
    `00-${'0'.repeat(32)}-${TRAINER}-01`,
    `00-${TRACE.toUpperCase()}-${TRAINER}-01`,
  ]) {
    const client = await RawClient.connect(service.url)
    await client.open({ ...OPEN, takeover: true })
    client.send({ type: 'step', step: 1, traceparent })
    t.match(await client.expect('error'), {
      code: 'FRAME_MALFORMED',
      message: /^step\.traceparent is .*, expected \^00-/,
    })
    await client.closed()
  }
  await service.app.close()
})
