import { appliedRule, receiptRule, settingsRule } from '../checkpoint/manifest-rules.js'
import { count, list, map, natural, oneOf, type Rule, record, sha256 } from '../rules.js'
import type { AppliedHead, EndHead, Head } from './journal-format.js'

// What every value of a record's head must be. Its checksum says that it is what was written, and not that this was
// right.

const gradient = record<AppliedHead>({ type: oneOf('gradient'), step: natural, parameter: count, applied: appliedRule })

const end = record<EndHead>({
  type: oneOf('end'),
  step: natural,
  digest: sha256,
  skipped: list(count),
  settings: settingsRule,
  receipt: receiptRule,
})

const type = oneOf('gradient', 'end')

/** The rule of a head: of each field, and of those that must agree with each other. */
export const headRule: Rule<Head> = {
  problem: (value, path) => {
    const notAMap = map.problem(value, path || 'the head')
    if (notAMap !== undefined) return notAMap
    const { type: kind } = value as Partial<Head>
    if (kind === 'gradient') return gradient.problem(value, path)
    if (kind === 'end') return end.problem(value, path) ?? disagreement(value as EndHead)
    return type.problem(kind, 'type')
  },
}

function disagreement({ step, digest, skipped, receipt }: EndHead): string | undefined {
  const differs = (what: string, has: unknown, expected: unknown) =>
    has === expected ? undefined : `${what} is ${has}, expected ${expected}`
  return (
    differs('receipt.step', receipt.step, step) ??
    differs('receipt.digest', receipt.digest, digest) ??
    differs('receipt.skipped', receipt.skipped, new Set(skipped).size)
  )
}
