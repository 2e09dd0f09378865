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
