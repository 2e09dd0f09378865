import { setTimeout as delay } from 'node:timers/promises'
import { LAST } from './model.js'
import { launchServer, type Server } from './server.js'
import { FLAGS, Site } from './site.js'
import { type Case, type Fault, judge, lost, type Verdict } from './stage.js'

const WAIT = ['--data-wait-seconds', '120']
const LOOK_MS = 300

/** Two services with the same data folder: only one of them may have it at a time. */
export function servers(): Fault[] {
  const fault = 'two servers, one folder'
  return [
    { fault, aimed: 'second starts during a run', full: 4, isQuick: true, attempt: (the) => refuse(the, false) },
    { fault, aimed: 'first is stopped (SIGSTOP)', full: 4, attempt: (the) => refuse(the, true) },
    { fault, aimed: 'both start at once', full: 4, attempt: race },
    {
      fault,
      aimed: 'second waits, first is killed',
      full: 4,
      isQuick: true,
      attempt: (the) => inherit(the, 'SIGKILL'),
    },
    { fault, aimed: 'second waits, first shuts down', full: 4, attempt: (the) => inherit(the, 'SIGTERM') },
  ]
}

function launchSecond(site: Site, flags: readonly string[] = []) {
  return launchServer({ data: site.data, log: site.log, flags: [...FLAGS, '--durability', site.durability, ...flags] })
}

/** The second service ends with one line, which names the holder of the folder; the run goes on. */
async function refuse({ folder, signal, reference }: Case, isStopped: boolean): Promise<Verdict> {
  const site = await Site.start({ folder, durability: 'journal' })
  const training = site.train('run', signal)
  if (isStopped) site.server.signal('SIGSTOP')
  const { server } = launchSecond(site)
  const { code, lines } = await server.exited
  const [line = ''] = lines
  if (isStopped) site.server.signal('SIGCONT')
  const outcome = await training.finally(() => site.close())
  const holder = `muond: data folder '${site.data}' is in use by process ${site.server.pid} on `
  if (code !== 1 || lines.length !== 1 || !line.startsWith(holder))
    return lost(`the second service ended with ${code} and ${JSON.stringify(lines)}`)
  const verdict = judge(outcome, reference, true)
  // The second service was refused; the run must not have been disturbed.
  return verdict.result === 'same' ? { result: 'error' } : lost(verdict.reason ?? 'the run was disturbed')
}

async function race({ folder, signal, reference }: Case): Promise<Verdict> {
  const site = await Site.start({ folder, durability: 'journal' })
  await site.kill()
  const both = [launchSecond(site), launchSecond(site)]
  const ports = await Promise.all(both.map(({ listening }) => listening))
  const listening = ports.filter((port) => port !== undefined)
  site.proxy.target = listening[0]
  const control = () => `http://127.0.0.1:${listening[0]}`
  const outcome = await (listening.length === 1 ? site.train('run', signal, { control }) : undefined)
  for (const { server } of both) await server.end('SIGKILL')
  await site.close()
  if (!outcome) return lost(`${listening.length} services listened, expected 1`)
  const { result, reason } = judge(outcome, reference, true)
  return result === 'same' ? { result: 'error' } : lost(reason ?? 'the run was disturbed')
}

/** The second service gets the folder as soon as the first one has gone, and the run goes on there. */
async function inherit({ folder, random, signal, reference }: Case, how: NodeJS.Signals): Promise<Verdict> {
  const site = await Site.start({ folder, durability: 'journal' })
  const { server, listening } = launchSecond(site, WAIT)
  const step = 1 + Math.floor(random() * (LAST - 1))
  let isBoth = false
  const onReceipt = async (finished: number) => {
    if (finished !== step) return
    const early = await Promise.race([listening, delay(LOOK_MS, 'none')])
    isBoth = early !== 'none'
    await handOver(site, how)
    site.proxy.target = await listening
  }
  const outcome = await site.train('run', signal, { onReceipt }).finally(() => end(site, server))
  if (isBoth) return lost('the second service listened while the first one had the folder')
  return judge(outcome, reference, true)
}

async function handOver(site: Site, how: NodeJS.Signals): Promise<void> {
  site.proxy.target = undefined
  await site.server.end(how)
}

async function end(site: Site, second: Pick<Server, 'end'>): Promise<void> {
  await second.end('SIGKILL')
  await site.close()
}
