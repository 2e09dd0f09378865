/** What replicas send of one parameter, with their weights, in the order of the replicas. */
export type Sent = readonly { readonly values: Float32Array; readonly weight: number }[]

/** The mean as docs/protocol.md has it: every operation rounded to float32, in the order of the replicas. */
export function meanOf(sent: Sent): Float32Array {
  const total = sent.reduce((sum, { weight }) => sum + weight, 0)
  const [first, ...rest] = sent.map(({ values, weight }) => {
    const share = Math.fround(weight / total)
    return values.map((value) => Math.fround(share * value))
  })
  return rest.reduce((sum, part) => sum.map((value, i) => Math.fround(value + part[i]!)), first!)
}

/** The mean in float64. */
export function exactMeanOf(sent: Sent): number[] {
  const total = sent.reduce((sum, { weight }) => sum + weight, 0)
  return Array.from(sent[0]!.values, (_, i) =>
    sent.reduce((sum, { values, weight }) => sum + (weight * values[i]!) / total, 0),
  )
}
