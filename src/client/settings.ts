import { isDeepStrictEqual } from 'node:util'
import type { ReceiptFrame, StepFrame } from '../wire/frame.js'

/**
 * The first thing that a `step` frame said and its receipt does not show, in words; undefined where there is none. A
 * service that never saw the frame has computed with other values, and nothing else would tell. A receipt does not name
 * `gradient_scale`.
 */
export function unheard({ groups = {}, max_logits = {} }: StepFrame, receipt: ReceiptFrame): string | undefined {
  for (const [group, values] of Object.entries(groups)) {
    for (const [key, said] of Object.entries(values)) {
      const has = receipt.groups[group]?.[key]
      // A list or a name may come back in another form.
      if (typeof said === 'number' && has !== said) return `has ${key} ${has} in group '${group}', said was ${said}`
    }
  }
  const lacking = Object.keys(max_logits).find((attention) => receipt.clipped_heads[attention] === undefined)
  return lacking === undefined ? undefined : `has no max_logits of attention '${lacking}'`
}

/** {group: {hyperparameter: value}} */
export type Groups = NonNullable<StepFrame['groups']>

/** What a `step` frame said of hyperparameters and is not in force, because the step was closed before it came. */
export function owedOf(frame: StepFrame | undefined, receipt: ReceiptFrame): Groups | undefined {
  const owed = Object.entries(frame?.groups ?? {}).flatMap(([group, values]) => {
    const rest = Object.entries(values).filter(([key, said]) => !isDeepStrictEqual(receipt.groups[group]?.[key], said))
    return rest.length > 0 ? [[group, Object.fromEntries(rest)] as const] : []
  })
  return owed.length > 0 ? Object.fromEntries(owed) : undefined
}

/** The values of both; those of `newer` count where there are two. */
export function mergeGroups(older: Groups, newer: Groups = {}): Groups {
  const merged = Object.entries(older).map(([group, values]) => [group, { ...values, ...newer[group] }] as const)
  return { ...newer, ...Object.fromEntries(merged) }
}
