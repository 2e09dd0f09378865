// Numbers as people read them. Nothing here knows of the page.

const PREFIXES = ['', 'k', 'M', 'G', 'T', 'P']

/**
 * Four significant digits; very small and very large ones with an exponent.
 * @param {number | undefined} value
 */
export function number(value) {
  if (value === undefined || value === null) return '–'
  if (!Number.isFinite(value)) return String(value)
  const size = Math.abs(value)
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2)
  return String(Number(value.toPrecision(4)))
}

/** @param {number} value */
export function count(value) {
  return value.toLocaleString('en-US')
}

/** @param {number} value */
export function bytes(value) {
  return `${scaled(value)}B`
}

/**
 * Three digits with a decimal prefix.
 * @param {number} value
 */
export function scaled(value) {
  const power = value < 1000 ? 0 : Math.min(PREFIXES.length - 1, Math.floor(Math.log10(value) / 3))
  const mantissa = value / 1000 ** power
  const digits = power === 0 ? String(Math.round(mantissa * 10) / 10) : mantissa.toPrecision(3)
  return `${digits} ${PREFIXES[power]}`
}

/** @param {number | undefined} value */
export function seconds(value) {
  if (value === undefined) return '–'
  if (value < 1e-3) return `${number(value * 1e6)} µs`
  if (value < 1) return `${Number((value * 1e3).toPrecision(3))} ms`
  if (value < 120) return `${Number(value.toPrecision(3))} s`
  return value < 7200 ? `${Math.round(value / 60)} min` : `${Number((value / 3600).toPrecision(2))} h`
}

/**
 * Steps a second, or seconds a step for those that take long.
 * @param {number | undefined} stepSeconds
 */
export function rate(stepSeconds) {
  if (stepSeconds === undefined || stepSeconds <= 0) return '–'
  return stepSeconds > 1
    ? `${seconds(stepSeconds)}/step`
    : `${number(Number((1 / stepSeconds).toPrecision(3)))} steps/s`
}

/**
 * @param {string | undefined} time RFC 3339
 * @param {number} now milliseconds since 1970
 */
export function ago(time, now) {
  if (!time) return '–'
  const passed = Math.max(0, (now - Date.parse(time)) / 1000)
  if (passed < 2) return 'now'
  if (passed < 120) return `${Math.round(passed)} s ago`
  if (passed < 7200) return `${Math.round(passed / 60)} min ago`
  return passed < 172_800 ? `${Math.round(passed / 3600)} h ago` : `${Math.round(passed / 86_400)} days ago`
}

/** @param {string} time RFC 3339 */
export function clock(time) {
  return time ? new Date(time).toLocaleTimeString('en-GB') : '–'
}

/** @param {string} time RFC 3339 */
export function dateTime(time) {
  return time ? new Date(time).toLocaleString('sv-SE') : '–'
}
