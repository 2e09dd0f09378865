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
