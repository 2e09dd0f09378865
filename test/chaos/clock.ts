import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { LAST } from './model.js'
import { type Durability, Site } from './site.js'
import { type Case, type Fault, judge, lost, type Verdict } from './stage.js'
import { startTrainer } from './trainer-child.js'

const HOUR_MS = 3_600_000
const MOST_HOURS = 12
const NOTE =
  'A module that is loaded before the program shifts Date, in the service and in the client. Monotonic clocks stay as they are, as they do where the time of a machine is set.'

/** The wall clock jumps by hours, forwards and backwards, several times in a run. */
export function clock(): Fault[] {
  return [
    { fault: 'clock jumps', aimed: 'during a run', note: NOTE, full: 8, attempt: (the) => jump(the, false) },
    {
      fault: 'clock jumps',
      aimed: 'during a run, and a kill -9',
      note: NOTE,
      full: 8,
      isQuick: true,
      attempt: (the) => jump(the, true),
    },
  ]
}

async function jump(the: Case, isKilled: boolean): Promise<Verdict> {
  const { random, folder, signal, reference } = the
  const file = join(folder, 'clock')
  const set = () => writeFileSync(file, String(Math.round((2 * random() - 1) * MOST_HOURS * HOUR_MS)))
  set()
  const durability: Durability = the.index % 2 === 0 ? 'journal' : 'checkpoint'
  const site = await Site.start({ folder, durability, clock: file })
  const killAt = isKilled ? 1 + Math.floor(random() * LAST) : 0
  let killed: Promise<unknown> | undefined
  site.proxy.meddle = ({ frame, label, direction }) => {
    if (direction === 'down' && label?.type === 'receipt' && frame.fin) {
      set()
      if (label.step === killAt) killed ??= site.kill().then(() => site.start())
    }
    return [frame.bytes]
  }
  const trainer = startTrainer(site, 'run', file)
  signal.addEventListener('abort', () => trainer.signal('SIGKILL'), { once: true })
  const outcome = await trainer.ended
  await killed
  await site.close()
  if (!('weights' in outcome)) return lost(`the trainer ended with ${outcome.code}: ${outcome.message}`)
  return { ...judge(outcome, reference, durability === 'journal'), fell: hasJumped(site.log) }
}

/** Whether the service's log has lines whose time is hours before or after that of the line before. */
function hasJumped(log: string): boolean {
  const times = [...readFileSync(log, 'utf8').matchAll(/"time":(\d+)/g)].map(([, time]) => Number(time))
  return times.some((time, i) => i > 0 && Math.abs(time - times[i - 1]) > HOUR_MS / 10)
}
