import { once } from 'node:events'
import t, { type Test } from 'tap'
import type { Assignment } from '../../../src/cluster/assignment.js'
import type { Coordinator, PeerReport } from '../../../src/cluster/coordinator/coordinator.js'
import { LOOKS_PER_LEASE } from '../../../src/cluster/coordinator/looks.js'
import { highestRendezvous } from '../../../src/cluster/coordinator/rendezvous.js'
import type { Subject, TestCluster } from './cluster.js'

type Case = (t: Test, cluster: TestCluster) => Promise<void>

const WRITERS = 16
/** A condition that does not hold after so many looks never will. */
const MOST_LOOKS = 60
/** Cases side by side. */
const JOBS = 4
/** More looks than a lease is long. */
const LOOKS = LOOKS_PER_LEASE + 1

const urlsOf = (coordinator: Coordinator) => coordinator.peers().map(({ url }) => url)

/** Waits for looks until a condition holds. */
async function until(coordinator: Coordinator, holds: () => boolean): Promise<void> {
  for (let seen = 0; !holds(); seen++) {
    /* c8 ignore next 2 -- a condition that never holds */
    if (seen === MOST_LOOKS)
      throw new Error(`after ${seen} looks the peers are ${urlsOf(coordinator)}, ${coordinator.problem()}`)
    await once(coordinator.changes, 'look')
  }
}

async function looks(coordinator: Coordinator, count: number): Promise<void> {
  for (let seen = 0; seen < count; seen++) await once(coordinator.changes, 'look')
}

async function started(t: Test, cluster: TestCluster, host: string, report?: () => PeerReport): Promise<Coordinator> {
  const coordinator = await cluster.open(host, report)
  t.teardown(() => coordinator.stop())
  await coordinator.start()
  return coordinator
}

function assignmentOf(run: string, generation: number, peer: string): Assignment {
  return { run, generation, shards: [{ peer, parameters: [0, 2] }] }
}

/** A run whose head, of all hosts, is the first one: with static peers that alone writes. */
function runOf(cluster: TestCluster, head = 'a'): string {
  const urls = ['a', 'b', 'c'].map((host) => cluster.urlOf(host))
  const names = Array.from({ length: 100 }, (_, i) => `run.${i}`)
  return names.find((name) => highestRendezvous(name, urls) === cluster.urlOf(head))!
}

const joinAndLeave: Case = async (t, cluster) => {
  const room = { free_bytes: 10, device: 'cuda:0' }
  const a = await started(t, cluster, 'a', () => room)
  t.same(urlsOf(a), [cluster.urlOf('a')], 'a process is its own peer')
  const b = await cluster.open('b')
  await b.start()
  await until(b, () => b.peers().length === 2)
  t.match(b.peers(), [{ url: cluster.urlOf('a'), ...room }, { url: cluster.urlOf('b') }])
  t.ok(b.peers().every(({ renewed_at }) => Math.abs(renewed_at - Date.now() / 1000) < 60))
  await until(a, () => a.peers().length === 2)
  t.same(urlsOf(a), urlsOf(b))
  room.free_bytes = 9
  await until(b, () => b.peers()[0]?.free_bytes === 9)
  const told = once(a.changes, 'peers')
  await b.stop()
  if (cluster.kind === 'leased') await told
  else await until(a, () => a.peers().length === 1)
  t.same(urlsOf(a), [cluster.urlOf('a')])
  t.equal(a.problem(), undefined, 'that another process is gone is no problem of this one')
}

const crash: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const child = await cluster.fork('b')
  await until(a, () => a.peers().length === 2)
  t.match(a.peers()[1], { url: child.url, free_bytes: 7, device: 'cpu' })
  await child.kill()
  await until(a, () => a.peers().length === 1)
  t.same(urlsOf(a), [cluster.urlOf('a')])
}

/** A lease is a guess: a process that was paused for longer goes on, and what it was head of has another head. */
const zombie: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const child = await cluster.fork('b')
  t.teardown(() => child.kill())
  await until(a, () => a.peers().length === 2)
  const run = runOf(cluster, 'b')
  t.equal(await a.headOf(run), child.url)
  child.pause()
  await until(a, () => a.peers().length === 1)
  const head = cluster.kind === 'leased' ? cluster.urlOf('a') : child.url
  t.equal(await a.headOf(run), head)
  child.resume()
  await until(a, () => a.peers().length === 2)
  t.equal(await a.headOf(run), head, 'a head that is alive stays')
  t.equal(await child.problem(), undefined)
}

const assignments: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const run = runOf(cluster)
  t.equal(await a.readAssignment(run), undefined)
  const first = assignmentOf(run, 1, cluster.urlOf('a'))
  t.equal(await a.writeAssignment(run, first, undefined), true)
  t.equal(await a.writeAssignment(run, assignmentOf(run, 1, cluster.urlOf('b')), undefined), false, 'there is one')
  const { version, value } = (await a.readAssignment(run))!
  t.same(value, first)
  const second = assignmentOf(run, 2, cluster.urlOf('b'))
  t.equal(await a.writeAssignment(run, second, version), true)
  t.equal(await a.writeAssignment(run, first, version), false, 'the version is an old one')
  t.equal(await a.removeAssignment(run, version), false)
  const newest = (await a.readAssignment(run))!
  t.same(newest.value, second)
  t.equal(await a.removeAssignment(run, newest.version), true)
  t.equal(await a.readAssignment(run), undefined)
  t.equal(await a.removeAssignment(run, newest.version), false)
  t.equal(await a.writeAssignment(run, second, newest.version), false, 'there is none any more')
}

/** Two processes, and with static peers the head alone, write at once; half of them from either. */
const race: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const writers = cluster.kind === 'leased' ? [a, await started(t, cluster, 'b')] : [a]
  const run = runOf(cluster)
  let version: string | undefined
  for (let generation = 1; generation <= 3; generation++) {
    const won = await Promise.all(
      Array.from({ length: WRITERS }, (_, i) =>
        writers[i % writers.length]!.writeAssignment(run, assignmentOf(run, generation, `http://writer-${i}`), version),
      ),
    )
    const winners = won.flatMap((has, i) => (has ? [`http://writer-${i}`] : []))
    const read = (await a.readAssignment(run))!
    t.same(winners, [read.value.shards[0]?.peer], 'exactly one has won, and its value stands')
    t.not(read.version, version)
    version = read.version
  }
}

const heads: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const b = await started(t, cluster, 'b')
  await until(a, () => a.peers().length === 2)
  await until(b, () => b.peers().length === 2)
  const runs = Array.from({ length: 12 }, (_, i) => `run.${i}`)
  const asked = await Promise.all(runs.map((run) => Promise.all([a.headOf(run), b.headOf(run)])))
  for (const answers of asked) t.equal(new Set(answers).size, 1, 'all who ask at once get one answer')
  const urls = cluster.kind === 'leased' ? ['a', 'b'] : ['a', 'b', 'c']
  const expected = runs.map((run) => highestRendezvous(run, urls.map(cluster.urlOf)))
  t.same(
    asked.map(([head]) => head),
    expected,
  )
  t.equal(new Set(expected).size, urls.length, 'heads are shared out')
  await b.stop()
  await until(a, () => a.peers().length === 1)
  const later = await Promise.all(runs.map((run) => a.headOf(run)))
  if (cluster.kind === 'leased')
    t.ok(
      later.every((head) => head === cluster.urlOf('a')),
      'the living one has all',
    )
  else t.same(later, expected, 'a function of the list')
}

const partition: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const b = await started(t, cluster, 'b')
  await until(a, () => a.peers().length === 2)
  const run = runOf(cluster)
  const head = await a.headOf(run)
  t.equal(await a.writeAssignment(run, assignmentOf(run, 1, head), undefined), true)
  let changes = 0
  a.changes.on('peers', () => changes++)
  await cluster.partition()
  await looks(a, LOOKS)
  t.equal(await a.headOf(run), head)
  if (cluster.kind === 'static') {
    t.same(urlsOf(a), [cluster.urlOf('a')], 'without a coordinator, who does not answer is not alive')
    t.equal(a.problem(), undefined)
    t.match(await a.readAssignment(run), { value: { generation: 1 } })
  } else {
    t.match(a.problem(), /^(etcd|kubernetes):.* cannot be reached, the peers are those of the last look: /)
    t.equal(changes, 0, 'nobody is dead because the coordinator is')
    t.equal(a.peers().length, 2)
    await t.rejects(a.headOf('never.seen'), { code: 'COORDINATOR_FAILED', retryable: true })
    await t.rejects(a.readAssignment(run), { code: 'COORDINATOR_FAILED' })
    await t.rejects(a.writeAssignment(run, assignmentOf(run, 2, head), '1'), { code: 'COORDINATOR_FAILED' })
    await t.rejects(a.removeAssignment(run, '1'), { code: 'COORDINATOR_FAILED' })
  }
  await cluster.heal()
  await until(a, () => a.problem() === undefined && a.peers().length === 2)
  await until(b, () => b.problem() === undefined && b.peers().length === 2)
  await looks(a, LOOKS)
  if (cluster.kind === 'leased') t.equal(changes, 0, 'and nobody when it is back')
  t.match(await a.readAssignment(run), { value: { generation: 1 } })
}

const clockJump: Case = async (t, cluster) => {
  const { now } = Date
  t.teardown(() => {
    Date.now = now
  })
  const a = await started(t, cluster, 'a')
  const child = await cluster.fork('b')
  t.teardown(() => child.kill())
  await until(a, () => a.peers().length === 2)
  let changes = 0
  a.changes.on('peers', () => changes++)
  for (const seconds of [86_400, -86_400]) {
    Date.now = () => now() + seconds * 1000
    await looks(a, LOOKS)
  }
  t.equal(changes, 0)
  t.equal(await child.problem(), undefined)
}

const oneName: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const first = await started(t, cluster, 'b', () => ({ free_bytes: 1, device: 'first' }))
  await until(a, () => a.peers().length === 2)
  if (cluster.kind === 'static') {
    // The port can be one process's only, so another one is told by who answers at its url.
    const second = await started(t, cluster, 'b')
    t.match(second.problem(), /^another process answers at http:\S+, as which this one is advertised$/)
    t.equal(first.problem(), undefined)
    return
  }
  const second = await started(t, cluster, 'b', () => ({ free_bytes: 2, device: 'second' }))
  await until(first, () => first.problem()?.startsWith('another') === true)
  t.equal(first.problem(), `another process has announced itself as ${cluster.urlOf('b')}, later than this one`)
  await until(a, () => a.peers()[1]?.device === 'second')
  await first.stop()
  await looks(a, LOOKS)
  t.same(urlsOf(a), ['a', 'b'].map(cluster.urlOf), 'that the earlier one leaves takes nothing from the later one')
  t.equal(second.problem(), undefined)
}

const lostAnswer: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const run = runOf(cluster)
  cluster.lose!.answers(1)
  t.equal(await a.writeAssignment(run, assignmentOf(run, 1, cluster.urlOf('a')), undefined), true, 'it is known again')
  t.match(await a.readAssignment(run), { value: { generation: 1 } })
}

const lostRequest: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const run = runOf(cluster)
  cluster.lose!.requests(1)
  // It may be on its way still, so that it was not done cannot be said.
  await t.rejects(a.writeAssignment(run, assignmentOf(run, 1, cluster.urlOf('a')), undefined), {
    code: 'COORDINATOR_FAILED',
    message: new RegExp(`^whether assignment of run '${run}' is written is not known: `),
  })
  t.equal(await a.readAssignment(run), undefined)
}

const spoilt: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const run = runOf(cluster)
  for (const [content, problem] of [
    ['{', /assignment of run 'run\.\d+': no JSON: /],
    [
      '{"mark":"m","value":{"run":"r","generation":0,"shards":[]}}',
      /: value\.generation is 0, expected a count above 0$/,
    ],
  ] as const) {
    await cluster.spoil(run, content)
    await t.rejects(a.readAssignment(run), { code: 'COORDINATOR_FAILED', message: problem })
  }
}

const tooLarge: Case = async (t, cluster) => {
  const a = await started(t, cluster, 'a')
  const run = runOf(cluster)
  const most = cluster.mostBytes!
  const withParameters = (count: number) => ({
    run,
    generation: 1,
    shards: [{ peer: cluster.urlOf('a'), parameters: new Array<number>(count).fill(1_000_000) }],
  })
  const fits = Math.floor((most - 300) / 8)
  t.equal(
    await a.writeAssignment(run, withParameters(fits), undefined),
    true,
    'the coordinator takes what is said to fit',
  )
  await t.rejects(a.writeAssignment(run, withParameters(fits + 100), undefined), {
    code: 'OVER_CAPACITY',
    message: new RegExp(
      `^the assignment of run '${run}' has \\d+ bytes, .* takes at most ${most}: use fewer parameters$`,
    ),
  })
}

const unreachable: Case = async (t, cluster) => {
  await cluster.partition()
  const a = await cluster.open('a')
  await t.rejects(a.start(), { name: 'ConfigError', message: /cannot be reached: / })
  await a.stop()
}

const CASES: Readonly<Record<string, Case>> = {
  'a process joins, tells what it has, and leaves': joinAndLeave,
  'a process that crashes is gone when its lease ends': crash,
  'a process that was paused comes back, and is head no more': zombie,
  'an assignment is written by its version': assignments,
  'of 16 writers at once exactly one wins': race,
  'whoever asks for the head of a run gets one answer': heads,
  'a partition makes nobody dead': partition,
  'of two processes with one name the later one stands': oneName,
  'a text that no process has written is refused': spoilt,
}
const LEASED: Readonly<Record<string, Case>> = {
  'a write whose answer is lost is known again': lostAnswer,
  'a write whose request is lost may have been done': lostRequest,
  'an assignment has a size that fits': tooLarge,
  'a start without the coordinator fails': unreachable,
}

/** Runs the suite: cases side by side, each in a cluster of its own, as most of their time is waiting for leases. */
export function runSuite(subject: Subject, kind: TestCluster['kind']): void {
  const cases = Object.entries({ ...CASES, ...(kind === 'leased' && LEASED) })
  t.test(subject.name, { jobs: JOBS }, async (t) => {
    for (const [name, run] of cases) t.test(name, { buffered: true }, (t) => inCluster(t, subject, run))
  })
  // It changes the clock of this process.
  t.test(`${subject.name}: a clock that jumps makes nobody dead`, (t) => inCluster(t, subject, clockJump))
  const { coordinator } = subject
  if (coordinator) t.test(`${subject.name}: it restarts`, (t) => inCluster(t, subject, restart(coordinator)))
}

async function inCluster(t: Test, subject: Subject, run: Case): Promise<void> {
  const cluster = await subject.cluster()
  t.teardown(() => cluster.close())
  await run(t, cluster)
}

function restart(server: NonNullable<Subject['coordinator']>): Case {
  return async (t, cluster) => {
    const a = await started(t, cluster, 'a')
    await started(t, cluster, 'b')
    await until(a, () => a.peers().length === 2)
    const run = runOf(cluster)
    const head = await a.headOf(run)
    const assignment = assignmentOf(run, 3, head)
    t.equal(await a.writeAssignment(run, assignment, undefined), true)
    let changes = 0
    a.changes.on('peers', () => changes++)
    await server.kill()
    await until(a, () => a.problem() !== undefined)
    await server.start()
    await until(a, () => a.problem() === undefined)
    await looks(a, LOOKS)
    t.equal(changes, 0, 'all are alive')
    t.match(await a.readAssignment(run), { value: assignment })
    t.equal(await a.headOf(run), head)
  }
}
