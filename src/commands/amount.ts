/** Three significant digits, without an exponent where it is short enough. */
export function decimal(value: number): string {
  return String(Number(value.toPrecision(3)))
}

const UNITS = ['', 'k', 'M', 'G', 'T', 'P', 'E'] as const

/** Three significant digits, a decimal prefix and the unit: `3.54 MB`. */
export function amount(value: number, unit = ''): string {
  const power = Math.min(UNITS.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(1, value)) / 3)))
  return `${decimal(value / 1000 ** power)} ${UNITS[power]}${unit}`.trim()
}

/** A count and its noun: `1 run`, `2 runs`. */
export function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? '' : 's'}`
}

const SECONDS = [
  ['d', 86_400],
  ['h', 3600],
  ['min', 60],
] as const

/** Seconds in the largest unit of which there are two at least: `90 s`, `3 h`, `2 d`. */
export function duration(seconds: number): string {
  const [unit, length] = SECONDS.find(([, length]) => seconds >= 2 * length) ?? ['s', 1]
  return `${Math.floor(seconds / length)} ${unit}`
}
