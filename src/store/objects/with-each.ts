/**
 * Does `work` with each item, with at most `most` of them at a time. Rejects with the first error, begins nothing more
 * then, and ends when nothing is under way any more.
 */
export async function withEach<T>(items: readonly T[], most: number, work: (item: T) => Promise<void>): Promise<void> {
  const left = items.values()
  let failure: { error: unknown } | undefined
  const worker = async () => {
    for (const item of left) {
      if (failure) return
      await work(item).catch((error) => {
        failure ??= { error }
      })
    }
  }
  await Promise.all(Array.from({ length: most }, worker))
  if (failure) throw failure.error
}
