import type { Attributes, Context, SpanContext, Tracer } from '@opentelemetry/api'
import type { Environment } from './config.js'
import type { Run } from './run/run.js'

/** Traces of steps: `watch` has each step that a run finishes from here on sent to a collector. */
export type Tracing = {
  watch(run: Run): void
  /** Sends what waits. Spans of later steps are lost. */
  close(): Promise<void>
}

type Api = typeof import('@opentelemetry/api')

const ENDPOINTS = ['OTEL_EXPORTER_OTLP_ENDPOINT', 'OTEL_EXPORTER_OTLP_TRACES_ENDPOINT'] as const

/**
 * Starts tracing where the variables of OpenTelemetry name a collector, which is sent OTLP over HTTP; undefined where
 * they name none, or OTEL_SDK_DISABLED is true, and then nothing of OpenTelemetry is loaded. Its libraries read
 * OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_* and OTEL_EXPORTER_OTLP_* themselves.
 */
export async function startTracing(env: Environment, version: string): Promise<Tracing | undefined> {
  if (!ENDPOINTS.some((name) => env[name]) || env.OTEL_SDK_DISABLED?.toLowerCase() === 'true') return undefined
  const [api, base, { OTLPTraceExporter }, resources] = await Promise.all([
    import('@opentelemetry/api'),
    import('@opentelemetry/sdk-trace-base'),
    import('@opentelemetry/exporter-trace-otlp-proto'),
    import('@opentelemetry/resources'),
  ])
  const own = resources.resourceFromAttributes({ 'service.name': 'muond', 'service.version': version })
  const provider = new base.BasicTracerProvider({
    resource: own.merge(resources.detectResources({ detectors: [resources.envDetector, resources.hostDetector] })),
    spanProcessors: [new base.BatchSpanProcessor(new OTLPTraceExporter())],
  })
  const tracer = provider.getTracer('muond', version)
  return { watch: (run) => traceSteps(run, tracer, api), close: () => provider.shutdown() }
}

/** When something began and ended, in milliseconds as `performance.now` counts. */
type Span = { name: string; began: number; ended: number; attributes: Attributes }

/**
 * A span for each step from its first frame to its receipt, below the span that the trainer has named in `traceparent`,
 * with a child for each phase: from its first work to its last, where `muond.seconds` are those of all of its work.
 */
function traceSteps(run: Run, tracer: Tracer, api: Api): void {
  let committed: Span | undefined
  run.on('committed', (seconds) => {
    const ended = performance.now()
    committed = { name: 'commit', began: ended - seconds * 1000, ended, attributes: { 'muond.seconds': seconds } }
  })
  run.on('receipt', ({ step: number, applied, skipped, gradient_norm }, { update_rms, gradient_bytes }, step) => {
    const ended = performance.now()
    const attributes: Attributes = {
      ...{ 'muond.run': run.name, 'muond.step': number, 'muond.applied': applied, 'muond.skipped': skipped },
      ...{ 'muond.gradient_norm': gradient_norm, 'muond.update_rms': update_rms },
      'muond.gradient_bytes': gradient_bytes,
    }
    const phases = [...step.clock.spans].map(([name, { began, ended }]) => {
      return { name, began, ended, attributes: { 'muond.seconds': step.clock.seconds[name] } }
    })
    const children = committed ? [...phases, committed] : phases
    committed = undefined
    const whole = { name: 'step', began: step.clock.began, ended, attributes }
    record({ tracer, api }, whole, { children, parent: parentOf(step.traceparent, api) })
  })
}

function record(
  { tracer, api }: { tracer: Tracer; api: Api },
  { name, began, ended, attributes }: Span,
  { children, parent }: { children: readonly Span[]; parent: Context },
): void {
  const at = (milliseconds: number) => performance.timeOrigin + milliseconds
  // What a trainer asks for is a server's span; its phases are internal ones.
  const kind = name === 'step' ? api.SpanKind.SERVER : api.SpanKind.INTERNAL
  const span = tracer.startSpan(`muond.${name}`, { startTime: at(began), attributes, kind }, parent)
  for (const child of children)
    record({ tracer, api }, child, { children: [], parent: api.trace.setSpan(parent, span) })
  span.end(at(ended))
}

/** https://www.w3.org/TR/trace-context/#traceparent-header: version, trace, span, flags. */
function parentOf(traceparent: string | undefined, { ROOT_CONTEXT, trace }: Api): Context {
  if (traceparent === undefined) return ROOT_CONTEXT
  const [, traceId, spanId, flags] = traceparent.split('-')
  const context: SpanContext = { traceId, spanId, traceFlags: Number.parseInt(flags, 16), isRemote: true }
  return trace.setSpanContext(ROOT_CONTEXT, context)
}
