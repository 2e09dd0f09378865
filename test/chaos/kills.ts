import { readFileSync } from 'node:fs'
import { AIMS, type Aim, type Shot } from './aims.js'
import { inspect, runFolder } from './folder.js'
import { LAST } from './model.js'
import type { Passing } from './proxy.js'
import { type Durability, Site } from './site.js'
import { type Case, type Fault, judge, lost, type Verdict } from './stage.js'

/** About how long the service takes to compute a journal's steps again. */
const RESTORE_MS = 60

/** kill -9 at every phase of a step: training runs with a journal and without one, shared out among the aims. */
export function kills(runs: Record<Durability, number>): Fault[] {
  return (['journal', 'checkpoint'] as const).flatMap((durability) => {
    const aims = AIMS.filter(({ durabilities }) => durabilities.includes(durability))
    return aims.map((aim, i): Fault => {
      const range = new Range(durability)
      return {
        fault: `kill -9, ${durability}`,
        aimed: aim.name,
        full: Math.floor((runs[durability] + i) / aims.length),
        isQuick: durability === 'journal' || aim.name === 'any time',
        attempt: (the) => range.shoot(the, aim),
        end: () => range.close(),
      }
    })
  })
}

/** The services of an aim: the one that comes back after a kill is also that of the next run. */
class Range {
  readonly #durability: Durability
  #site: Site | undefined

  constructor(durability: Durability) {
    this.#durability = durability
  }

  async shoot(the: Case, aim: Aim): Promise<Verdict> {
    const site = this.#site ?? (await Site.start({ folder: the.folder, durability: this.#durability }))
    // After a loss the site is left as it is, for a person to look at.
    this.#site = undefined
    const verdict = await shoot(site, the, aim).catch(async (error) => {
      await site.close()
      throw error
    })
    if (verdict.result === 'lost') await site.close()
    else this.#site = site
    return verdict
  }

  async close(): Promise<void> {
    await this.#site?.clear()
  }
}

async function shoot(site: Site, the: Case, aim: Aim): Promise<Verdict> {
  const run = `run-${the.seed}`
  const witness = new Witness()
  const { shot, struck } = aimAt(site, run, the)
  const meddle = aim.meddle?.(shot)
  let endWatch: (() => void) | undefined
  site.proxy.meddle = (passing) => {
    witness.see(passing)
    if (passing.label?.type === 'opened' && !shot.struck) endWatch ??= aim.watch?.(shot)
    return meddle && !shot.struck ? meddle(passing) : [passing.frame.bytes]
  }
  const trainer = site.trainer(run, the.signal)
  const training = trainer.train()
  // Where the run is over before the kill, the service is killed all the same.
  await Promise.race([struck, training.catch(() => undefined)])
  endWatch?.()
  await site.kill()
  const remains = await inspect(runFolder(site.data, run))
  if (aim.again) await site.startBriefly(the.random() * RESTORE_MS)
  const restoring = aim.again !== undefined && isRestoring(site.log)
  await site.start()
  const outcome = shot.struck ? await training : await site.train(run, the.signal, { kept: trainer.kept })
  const journal = site.durability === 'journal'
  const verdict = judge(outcome, the.reference, journal)
  if (verdict.result === 'lost') return verdict
  if (journal && witness.loss) return lost(witness.loss)
  await site.remove(run)
  return { ...verdict, fell: shot.struck && (aim.fell?.(shot, { ...remains, restoring }) ?? true) }
}

function aimAt(site: Site, run: string, { random, reference }: Case) {
  let resolve: () => void
  const struck = new Promise<void>((done) => {
    resolve = done
  })
  const strike = () => {
    if (shot.struck) return
    shot.struck = true
    site.server.signal('SIGKILL')
    resolve()
  }
  const step = 1 + Math.floor(random() * LAST)
  const folder = runFolder(site.data, run)
  const { seconds } = reference
  const shot: Shot = { random, step, folder, seconds, strike, struck: false, answers: 0 }
  return { shot, struck }
}

/** Whether the last service that began to listen was gone before it had restored a run. */
function isRestoring(log: string): boolean {
  const lines = readFileSync(log, 'utf8').split('\n')
  const listened = lines.findLastIndex((line) => line.includes('"event":"listening"'))
  return !lines.slice(listened).some((line) => line.includes('"event":"run_restored"'))
}

/** Records every receipt that the service sent, and the run's step whenever it was opened. */
class Witness {
  loss: string | undefined
  #acknowledged = 0

  see({ label, direction, frame }: Passing): void {
    const { type, step } = label ?? {}
    if (direction === 'up' || step === undefined || frame.opcode === 0) return
    if (type === 'receipt') this.#acknowledged = Math.max(this.#acknowledged, step)
    if (type !== 'opened' || step >= this.#acknowledged) return
    this.loss = `the receipt of step ${this.#acknowledged} was sent, the run resumed at step ${step}`
  }
}
