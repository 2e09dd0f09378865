import type { FastifyBaseLogger } from 'fastify'
import type { Principal } from '../../access/principal.js'
import type { Cluster } from '../../cluster/cluster.js'
import type { Config } from '../../config.js'
import type { Runs } from '../../keep/runs.js'
import { checkOpening } from '../../link/permission.js'
import type { Connection } from '../../run/members/member.js'
import { type ParameterDescription, PROTOCOL } from '../../wire/frame.js'
import { frameOfJson } from '../../wire/json-frame.js'
import type { components } from '../openapi.js'

type Schemas = components['schemas']

/** Most bytes of the body: JSON of this length is read in some ten milliseconds, in which nobody else has a turn. */
export const OPEN_BODY_BYTES = 2 ** 20

/** It lets go of the run in the turn in which it gets it: nothing can end it before. */
/* c8 ignore next -- so nobody calls these */
const NOBODY: Connection = { fence: () => {}, expel: () => {}, changed: () => {} }

/**
 * Opens a run as the frame `open` does, and lets go of it: the steps that follow are requests of their own. Throws
 * whatever `open` does.
 */
export async function openRun(
  { config, runs, cluster }: { config: Config; runs: Runs; cluster: Cluster | undefined },
  body: Schemas['Open'],
  { principal, log }: { principal: Principal; log: FastifyBaseLogger },
): Promise<Schemas['Opened']> {
  const frame = frameOfJson('open', { protocol: PROTOCOL, ...body }, config)
  checkOpening(principal, runs, frame)
  cluster?.checkPlain(frame)
  const { run, member, resumed } = await runs.open(frame, NOBODY, principal)
  run.intake.detach(member)
  const { ahead, groups, ...opened } = run.opened(resumed)
  const { name, epoch, step } = run
  log.info({ event: 'run_opened', run: name, epoch, step, resumed, client: frame.client, key: principal.name })
  const parameters = frame.parameters ? {} : { parameters: [...run.describeParameters()].map(plain) }
  return { ...opened, ahead: [...ahead], attentions: [...run.attentions], groups: { ...groups }, ...parameters }
}

function plain({ shape, split, ...rest }: ParameterDescription): Schemas['ParameterDescription'] {
  return { ...rest, shape: [...shape], ...(split && { split: [...split] }) }
}
