import { count, list, type Rule, record, text } from '../../../store/rules.js'
import type { ProbeAnswer } from './static.js'

/** Where a process is to answer the probes of its peers, with the key of the cluster; openapi.yaml has it not yet. */
export const PROBE_PATH = '/v1/peer'

const answerRule: Rule<ProbeAnswer> = record<ProbeAnswer>({
  free_bytes: count,
  device: text(),
  incarnation: text(),
  peers: list(text()),
})

/** Asks a process for what it tells its peers. Throws where it answers otherwise, or not before `signal` ends. */
export async function probePeer(url: string, key: string, signal: AbortSignal): Promise<ProbeAnswer> {
  const response = await fetch(url + PROBE_PATH, {
    headers: { authorization: `Bearer ${key}` },
    redirect: 'error',
    signal,
  })
  if (!response.ok) throw new Error(`${url}${PROBE_PATH} answers ${response.status}`)
  const answer: unknown = await response.json()
  const problem = answerRule.problem(answer, '')
  if (problem !== undefined) throw new Error(`${url}${PROBE_PATH}: ${problem}`)
  return answer as ProbeAnswer
}
