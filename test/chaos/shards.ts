import { setTimeout as delay } from 'node:timers/promises'
import { Cluster } from './cluster.js'
import { type Case, type Fault, judge, type Verdict } from './stage.js'

const STOPPED_MS = [50, 400] as const
const PARTED_MS = [50, 1500] as const
const RUN = 'run'

/** What happens to a process of the cluster while it trains. */
type Happening = (cluster: Cluster, i: number, the: Case) => Promise<void>

/** Whose process it happens to: that of the head, another one, or any. */
type Whom = 'head' | 'shard'

/** A run over two or three processes, each of which is killed, stopped and cut off: digest and weights are those of one process. */
export function shards(): Fault[] {
  const row = (fault: string, whom: Whom, happen: Happening, more: Partial<Fault> = {}): Fault => ({
    ...{ fault: `shards, ${fault}`, aimed: whom, full: 12, ...more },
    attempt: (the) => attempt(the, whom, happen),
  })
  return [
    { fault: 'shards', aimed: 'nothing', full: 3, attempt: undisturbed },
    row('kill -9', 'head', kill, { isQuick: true, full: 40 }),
    row('kill -9', 'shard', kill, { isQuick: true, full: 40 }),
    { fault: 'shards, kill -9', aimed: 'all at once', full: 20, attempt: (the) => atAnyTime(the, killAll) },
    row('SIGSTOP, SIGCONT', 'head', stop),
    row('SIGSTOP, SIGCONT', 'shard', stop, { isQuick: true }),
    row('connections cut', 'head', cut, { full: 16 }),
    row('connections cut', 'shard', cut, { full: 16 }),
    row('partition', 'head', part, { isQuick: true, full: 20 }),
    row('partition', 'shard', part, { full: 20 }),
  ]
}

function attempt(the: Case, whom: Whom, happen: Happening): Promise<Verdict> {
  return atAnyTime(the, async (cluster) => {
    const head = await cluster.headOf(RUN)
    const others = Array.from({ length: cluster.size }, (_, i) => i).filter((i) => i !== head)
    await happen(cluster, whom === 'head' ? head : others[Math.floor(the.random() * others.length)], the)
  })
}

async function undisturbed(the: Case): Promise<Verdict> {
  const cluster = await clusterFor(the)
  const outcome = await cluster.train(RUN, the.signal).finally(() => cluster.close({ keep: false }))
  return judge(outcome, the.reference, true)
}

/** Trains, and has something happen at a random step and moment of it. */
async function atAnyTime(the: Case, happen: (cluster: Cluster) => Promise<void>): Promise<Verdict> {
  const cluster = await clusterFor(the)
  let verdict: Verdict | undefined
  try {
    const at = 1 + Math.floor(the.random() * (the.reference.digests.length - 1))
    let begun: () => void
    const reached = new Promise<void>((resolve) => {
      begun = resolve
    })
    const training = cluster.trainer(RUN, the.signal, { onReceipt: (step) => void (step === at && begun()) }).train()
    await Promise.race([reached, training])
    // Within the next step, whose phases take some milliseconds each.
    await delay((the.random() * 2000 * the.reference.seconds) / the.reference.digests.length)
    await happen(cluster)
    verdict = judge(await training, the.reference, true)
    return verdict
  } finally {
    // After a loss the folders stay as they are, for a person to look at.
    await cluster.close({ keep: verdict === undefined || verdict.result === 'lost' })
  }
}

function clusterFor({ folder, index }: Case): Promise<Cluster> {
  return Cluster.start(folder, 2 + (index % 2))
}

const kill: Happening = async (cluster, i) => {
  await cluster.kill(i)
  await cluster.start(i)
}

async function killAll(cluster: Cluster): Promise<void> {
  const all = Array.from({ length: cluster.size }, (_, i) => i)
  await Promise.all(all.map((i) => cluster.kill(i)))
  await Promise.all(all.map((i) => cluster.start(i)))
}

const stop: Happening = async (cluster, i, the) => {
  cluster.signal(i, 'SIGSTOP')
  await delay(between(STOPPED_MS, the))
  cluster.signal(i, 'SIGCONT')
}

const cut: Happening = async (cluster, i) => cluster.gate(i).cut()

const part: Happening = async (cluster, i, the) => {
  cluster.gate(i).isOpen = false
  await delay(between(PARTED_MS, the))
  cluster.gate(i).isOpen = true
}

function between([least, most]: readonly [number, number], { random }: Case): number {
  return least + random() * (most - least)
}
