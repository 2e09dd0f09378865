import type { AttentionDescription, OpenedFrame, PlacedFrame } from '../../wire/frame.js'
import type { Part } from './part.js'

/** What one process would have answered to the `open` of the whole. */
export function openedOf({ run, step, resumed, digest, server }: PlacedFrame, parts: readonly Part[]): OpenedFrame {
  const [{ opened: first }] = parts
  const ahead = parts.flatMap((part) => aheadOf(part, step)).sort((one, other) => one - other)
  const notes = parts.flatMap(({ opened: { note } }) => (note === undefined ? [] : [note]))
  const { epoch, groups, member, members } = first
  return {
    ...{ type: 'opened', run, epoch, step, resumed, digest, ahead, groups, server },
    attentions: parts.flatMap(attentionsOf),
    limits: { chunk_bytes: Math.min(...parts.map(({ opened }) => opened.limits.chunk_bytes)) },
    ...(notes.length > 0 && { note: [...new Set(notes)].join('; ') }),
    ...(member && { member }),
    ...(members && { members }),
  }
}

/** Of a shard that has finished the step which the whole has not committed, all of its parameters are ahead. */
function aheadOf({ indices, opened }: Part, step: number): number[] {
  return opened.step > step ? [...indices] : opened.ahead.map((local) => indices[local])
}

function attentionsOf({ indices, opened }: Part): AttentionDescription[] {
  const rows = ({ parameter, ...rest }: AttentionDescription['query']) => ({ ...rest, parameter: indices[parameter] })
  return opened.attentions.map(({ query, key, query_bias, key_bias, ...attention }) => ({
    ...{ ...attention, query: rows(query), key: rows(key) },
    ...(query_bias && { query_bias: rows(query_bias) }),
    ...(key_bias && { key_bias: rows(key_bias) }),
  }))
}
