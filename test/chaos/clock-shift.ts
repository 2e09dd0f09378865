import { readFileSync } from 'node:fs'

// Loaded before a program (`node --import`), whose wall clock is then off by the milliseconds that a file says at that
// moment. Monotonic clocks (performance.now, timers) stay as they are, as they do when a machine's time is set.

const file = process.env.CHAOS_CLOCK ?? ''
const RealDate = Date

const now = () => RealDate.now() + Number(readFileSync(file, 'utf8'))

globalThis.Date = new Proxy(RealDate, {
  construct: (target, values, newTarget) => Reflect.construct(target, values.length > 0 ? values : [now()], newTarget),
  get: (target, key) => (key === 'now' ? now : Reflect.get(target, key)),
})
