/** Of a step; one of the same step that is not the first has a number behind it. No two of a run are the same. */
const CHECKPOINT = /^step-(\d{12})(?:\.(\d{1,9}))?$/

export function isCheckpointId(name: string): boolean {
  return CHECKPOINT.test(name)
}

/** The id of the first checkpoint of a step, or of one with a number. */
export function checkpointId(step: number, number = 0): string {
  const id = `step-${String(step).padStart(12, '0')}`
  return number === 0 ? id : `${id}.${number}`
}

/** The step in a checkpoint's id, and the number behind it, 0 where there is none. */
export function numbersOf(checkpoint: string): [step: number, number: number] {
  const [step, number = 0] = checkpoint.slice('step-'.length).split('.')
  return [Number(step), Number(number)]
}

/** Orders ids, the oldest first. */
export function byAge(one: string, other: string): number {
  const [a, b] = [numbersOf(one), numbersOf(other)]
  return a[0] - b[0] || a[1] - b[1]
}
