import { type Metrics, PHASES } from '../metrics.js'
import type { Run } from '../run/run.js'

/** Ranks and replicas with a label of their own: the number of series stays bounded. */
const MOST_LABELS = 64

/**
 * Has the metrics count every step that a run finishes from here on: steps that a restart computes again were counted
 * before.
 */
export function measure(run: Run, metrics: Metrics): void {
  run.on('receipt', ({ seconds, clipped_heads, max_logit, gradient_norm }, { wall_seconds }) => {
    metrics.steps_total.inc()
    metrics.step_seconds.observe(wall_seconds)
    metrics.last_step_timestamp_seconds.setToCurrentTime()
    metrics.gradient_norm.observe(gradient_norm)
    for (const count of Object.values(clipped_heads)) metrics.clipped_heads_total.inc(count)
    if (max_logit !== undefined) metrics.max_logit.observe(max_logit)
    for (const phase of PHASES) metrics.step_phase_seconds.observe({ phase }, seconds[phase])
  })
  run.on('waited', (waited) => {
    for (const { rank, replica, seconds } of waited)
      metrics.member_wait_seconds_total.inc({ rank: labelOf(rank), replica: labelOf(replica) }, seconds)
  })
  run.on('left_out', (replicas) => metrics.left_out_replicas_total.inc(replicas))
  run.on('quorum_lost', () => metrics.lost_quorums_total.inc())
  run.on('committed', (seconds) => metrics.journal_commit_seconds.observe(seconds))
}

function labelOf(number: number): string {
  /* c8 ignore next -- a run of more ranks than have a label */
  return number < MOST_LABELS ? String(number) : `${MOST_LABELS} and more`
}
