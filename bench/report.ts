import type { Efficiency } from './efficiency.js'
import type { Measurement } from './workload.js'

/** A bound that was stated before anything was measured, and whether it holds. */
export type Verdict = { what: string; value: number; bound: number; unit: string; pass: boolean }

// The bounds: memory beyond state, gradients and updates; GFLOP/s of Newton-Schulz over those of one large MatMul.
const SPARE_BYTES = 250e6
const LEAST_EFFICIENCY = 0.8

/**
 * The figures for the table and the file: medians of seconds and of each pair's ratio, and means of CPU seconds,
 * because /proc counts those in hundredths and a small step takes only a few.
 */
export function summarize(measurement: Measurement) {
  const { pairs, gradient_bytes, state_bytes, memory } = measurement
  const moved = 2 * gradient_bytes
  const cpu = {
    service: mean(pairs.map(({ service }) => service.cpu_seconds)),
    reference: mean(pairs.map(({ reference }) => reference.cpu_seconds)),
  }
  return {
    workload: measurement.workload,
    reference: measurement.reference,
    seconds: median(pairs.map(({ service }) => service.seconds)),
    cpu_seconds: cpu.service,
    gigabytes_per_second: moved / 1e9 / median(pairs.map(({ service }) => service.seconds)),
    reference_seconds: median(pairs.map(({ reference }) => reference.seconds)),
    reference_cpu_seconds: cpu.reference,
    seconds_ratio: median(pairs.map(({ service, reference }) => service.seconds / reference.seconds)),
    cpu_ratio: cpu.service / cpu.reference,
    peak_bytes: memory.peak,
    bound_bytes: state_bytes + moved + SPARE_BYTES,
  }
}

export function summarizeEfficiency({ size, threads, pairs }: Efficiency) {
  const each = (of: (pair: Efficiency['pairs'][number]) => number) => median(pairs.map(of))
  return {
    size,
    threads,
    newton_schulz_gflops: each(({ newton_schulz }) => newton_schulz.gflops),
    matmul_gflops: each(({ matmul }) => matmul.gflops),
    ratio: each(({ newton_schulz, matmul }) => newton_schulz.gflops / matmul.gflops),
    cpu_ratio: each(({ newton_schulz, matmul }) => newton_schulz.gflops_per_cpu / matmul.gflops_per_cpu),
  }
}

export type Summary = ReturnType<typeof summarize>
export type EfficiencySummary = ReturnType<typeof summarizeEfficiency>

export function verdicts(workloads: readonly Summary[], efficiencies: readonly EfficiencySummary[]): Verdict[] {
  const memory = workloads.map(({ workload, peak_bytes, bound_bytes }) => ({
    what: `peak RSS, ${workload}`,
    value: peak_bytes / 1e6,
    bound: bound_bytes / 1e6,
    unit: 'MB',
    pass: peak_bytes <= bound_bytes,
  }))
  const speed = efficiencies.map(({ size, threads, ratio }) => ({
    what: `Newton-Schulz over MatMul, ${size}², ${threads} thread${threads > 1 ? 's' : ''}`,
    value: ratio,
    bound: LEAST_EFFICIENCY,
    unit: '',
    pass: ratio >= LEAST_EFFICIENCY,
  }))
  return [...memory, ...speed]
}

/** The tables, as text. */
export function render(workloads: readonly Summary[], efficiencies: readonly EfficiencySummary[]): string {
  const steps = workloads.map((row) => [
    row.workload,
    row.reference,
    ...[
      row.seconds,
      row.reference_seconds,
      row.seconds_ratio,
      row.cpu_seconds,
      row.reference_cpu_seconds,
      row.cpu_ratio,
    ].map(digits),
    digits(row.gigabytes_per_second),
  ])
  const head = ['one step of', 'against', 's', 'its s', 'ratio', 'CPU s', 'its CPU s', 'ratio', 'GB/s up+down']
  const kernels = efficiencies.map((row) => [
    `${row.size} x ${row.size}`,
    String(row.threads),
    ...[row.newton_schulz_gflops, row.matmul_gflops, row.ratio, row.cpu_ratio].map(digits),
  ])
  const kernelHead = ['Newton-Schulz of', 'threads', 'GFLOP/s', 'MatMul GFLOP/s', 'ratio', 'ratio per CPU s']
  const bounds = verdicts(workloads, efficiencies).map(({ what, value, bound, unit, pass }) => [
    what,
    digits(value),
    `${unit === 'MB' ? '<=' : '>='} ${digits(bound)}`,
    unit,
    pass ? 'pass' : 'FAIL',
  ])
  return [table(head, steps), table(kernelHead, kernels), table(['bound', 'measured', 'stated', '', ''], bounds)].join(
    '\n\n',
  )
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length
}

function digits(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3)
}

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = head.map((title, column) =>
    Math.max(...[head, ...rows].map((row) => row[column].length), title.length),
  )
  const isText = (column: number) => rows.every((row) => Number.isNaN(Number.parseFloat(row[column])))
  const line = (row: readonly string[]) =>
    row.map((cell, i) => (isText(i) ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))).join('  ')
  return [line(head), widths.map((width) => '-'.repeat(width)).join('  '), ...rows.map(line)].join('\n')
}
