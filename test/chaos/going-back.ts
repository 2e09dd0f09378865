import { once } from 'node:events'
import { connect } from '../../src/client/client.js'
import { pause } from './aims.js'
import { declaration, firstWeights, LAST } from './model.js'
import { type Durability, Site } from './site.js'
import { type Case, type Fault, judge, lost, type Reference, type Verdict } from './stage.js'

const RUN = 'run'
/** Steps whose checkpoints are tagged. */
const TAGGED = { four: 4, eight: 8 } as const
type Tag = keyof typeof TAGGED
/** About how long the service takes to go back on a busy machine: some kills come when it has. */
const GO_BACK_MS = 150
const LOOK_MS = 20

/**
 * kill -9 while a run goes back behind checkpoints with a tag, or over to those of a branch that it has left: it comes
 * up where it was or where it goes, and every tag leads to what it led to.
 */
export function goingBack(): Fault[] {
  return (['journal', 'checkpoint'] as const).flatMap((durability) =>
    [false, true].map(
      (across): Fault => ({
        fault: `kill -9, ${durability}`,
        aimed: across ? 'going to another branch' : 'going back behind tags',
        full: 12,
        isQuick: true,
        attempt: (the) => attempt(the, durability, across),
      }),
    ),
  )
}

async function attempt(the: Case, durability: Durability, across: boolean): Promise<Verdict> {
  const site = await Site.start({ folder: the.folder, durability })
  try {
    return await goBackAndBeKilled(site, the, across)
  } finally {
    await site.close()
  }
}

async function goBackAndBeKilled(site: Site, the: Case, across: boolean): Promise<Verdict> {
  const { reference, signal } = the
  const trainer = site.trainer(RUN, signal, { onReceipt: (step) => tag(site, step) })
  await trainer.train()
  const { kept } = trainer
  if (across) {
    await goTo(site, 'four')
    await site.train(RUN, signal, { kept })
  }
  // From here on the run is at its last step whatever happens, with a journal or without one.
  await checkpoint(site)
  const target: Tag = across ? 'eight' : 'four'
  const fell = await killWhileGoingTo(site, the, target)
  await site.start()
  const wrong = (await whereItIs(site, reference, TAGGED[target])) ?? (await whatTagsLeadTo(site, reference))
  if (wrong !== undefined) return lost(wrong)
  const verdict = judge(await site.train(RUN, signal, { kept }), reference, site.durability === 'journal')
  return { ...verdict, fell }
}

/** Tags the checkpoint of a step that is to have one, between this step and the next. */
async function tag(site: Site, finished: number): Promise<void> {
  const found = Object.entries(TAGGED).find(([, step]) => step === finished)
  if (found) await checkpoint(site, { tag: found[0] })
}

async function checkpoint(site: Site, body: { tag?: string } = {}): Promise<void> {
  const headers = { 'content-type': 'application/json' }
  const url = `${site.control()}/v1/runs/${RUN}/checkpoints`
  const { status } = await fetch(url, { method: 'POST', headers, body: JSON.stringify(body) })
  if (status !== 201) throw new Error(`a checkpoint answered ${status}, expected 201`)
}

/** Opens the run at the checkpoint of a tag, and gives the step and the digest that it is told. */
async function goTo(site: Site, checkpoint: Tag): Promise<{ step: number; digest: string }> {
  const client = await connect(site.proxy.url, { retries: 0, transport: 'websocket' })
  try {
    const given = declaration(RUN, firstWeights())
    const run = await client.open({ ...given, mode: 'resume', takeover: true, checkpoint })
    return { step: run.step_count, digest: run.digest }
  } finally {
    await client.close()
  }
}

/** Answers whether the kill came before the service could tell that it had gone there. */
async function killWhileGoingTo(site: Site, { random }: Case, target: Tag): Promise<boolean> {
  let answered = false
  const struck = new AbortController()
  const over = once(struck.signal, 'abort')
  site.proxy.meddle = async ({ frame, label, direction, link }) => {
    if (label?.type === 'opened') answered = true
    if (label?.type !== 'open' || direction === 'down') return [frame.bytes]
    await link.write(direction, frame.bytes)
    await pause(random() * GO_BACK_MS)
    site.server.signal('SIGKILL')
    struck.abort()
    return []
  }
  await Promise.allSettled([goTo(site, target), over])
  await site.kill()
  site.proxy.rest()
  return !answered
}

/** What is wrong with where the run is: it has to be where it was or where it goes. */
async function whereItIs(site: Site, { digests }: Reference, target: number): Promise<string | undefined> {
  const { step, digest } = await restored(site)
  if (step !== target && step !== LAST) return `the run is at step ${step}, expected ${target} or ${LAST}`
  if (digest === digests[step - 1]) return undefined
  return `step ${step} has digest ${digest}, expected ${digests[step - 1]}`
}

async function restored(site: Site): Promise<{ step: number; digest: string }> {
  for (;;) {
    const answer = await fetch(`${site.control()}/v1/runs/${RUN}`)
    if (answer.status === 200) return (await answer.json()) as { step: number; digest: string }
    if (answer.status !== 503) throw new Error(`the run answered ${answer.status}: ${await answer.text()}`)
    await pause(LOOK_MS)
  }
}

/** What is wrong with the checkpoints that have tags: each is gone to, the one to train on from at last. */
async function whatTagsLeadTo(site: Site, { digests }: Reference): Promise<string | undefined> {
  for (const name of ['eight', 'four', 'eight', 'four'] as const) {
    const { step, digest } = await goTo(site, name)
    if (step !== TAGGED[name] || digest !== digests[step - 1])
      return `tag '${name}' leads to step ${step} with digest ${digest}`
  }
  return undefined
}
