import { spawnSync } from 'node:child_process'
import { chmodSync, chownSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { MuondError } from '../../src/client/client.js'
import { mountDisk, refusalToMount } from './disk.js'
import { runFolder } from './folder.js'
import { LAST } from './model.js'
import { PROGRAM, startServer } from './server.js'
import { type Durability, Site } from './site.js'
import { type Case, type Fault, lost, type Verdict } from './stage.js'
import type { Trainer } from './trainer.js'
import { askAgain, judgeUnwritable, takeCheckpoint } from './unwritable.js'

const NOBODY = 65_534
const IS_ROOT = process.getuid?.() === 0

/** A data folder that cannot be written to, at the start and during a run. The service runs as nobody: root may all. */
export function readOnly(folder: string): Fault[] {
  const noMount = refusalToMount(folder)
  const noUser = refusalOfUser()
  const row = (full: number, refused: string | undefined) => {
    return refused ? { full: 0, note: `Not carried out: ${refused}.` } : { full }
  }
  const fault = 'read-only folder'
  return [
    { fault, aimed: 'a mount, at the start', ...row(2, noMount), attempt: startOnMount },
    { fault, aimed: 'permissions, at the start', ...row(2, noUser), attempt: startWithoutPermission },
    ...(['journal', 'checkpoint'] as const).map((durability): Fault => {
      return {
        ...{ fault: `${fault}, ${durability}`, aimed: 'permissions, during a run', ...row(4, noUser) },
        isQuick: durability === 'journal',
        attempt: (the) => loseThePermission(the, durability),
      }
    }),
  ]
}

async function startOnMount({ folder }: Case): Promise<Verdict> {
  const disk = mountDisk(join(folder, 'disk'))
  try {
    disk.makeReadOnly()
    return await refusedStart({ data: join(disk.path, 'data'), log: join(folder, 'server.log') })
  } finally {
    disk.remove()
  }
}

async function startWithoutPermission({ folder }: Case): Promise<Verdict> {
  const data = join(folder, 'data')
  mkdirSync(data)
  chmodSync(data, 0o555)
  return refusedStart({ data, log: join(folder, 'server.log'), ...asNobody() })
}

/** The service ends with one line, which names the folder that it cannot write to. */
async function refusedStart(options: { data: string; log: string; uid?: number }): Promise<Verdict> {
  const server = await startServer(options)
  if (server.port !== undefined) {
    await server.end('SIGKILL')
    return lost(`the service listens although ${options.data} cannot be written to`)
  }
  const { code, lines } = await server.exited
  const [line = ''] = lines
  const isTold = line.startsWith(`muond: data folder '${options.data}' is not writable: `)
  if (code === 1 && isTold && lines.length === 1) return { result: 'error' }
  return lost(`the service ended with code ${code} and ${JSON.stringify(lines)}`)
}

/** From a random step on no file can be made, until the trainer has been told of it. */
async function loseThePermission(the: Case, durability: Durability): Promise<Verdict> {
  const data = join(the.folder, 'data')
  mkdirSync(data)
  if (IS_ROOT) chownSync(data, NOBODY, NOBODY)
  const site = await Site.start({ folder: the.folder, durability, ...asNobody() })
  const folder = runFolder(data, 'run')
  const allow = (mode: number) => {
    for (const path of [folder, join(folder, 'checkpoints'), join(folder, 'journal')]) chmodSync(path, mode)
  }
  const step = 1 + Math.floor(the.random() * (LAST - 2))
  const decide = (error: MuondError) => {
    if (error.code === 'STORAGE_FAILED') allow(0o755)
    return askAgain(error)
  }
  const onReceipt = async (finished: number, trainer: Trainer) => {
    if (finished === step) allow(0o555)
    if (finished < step) return
    // Every other time the connection is cut: the new `open` has to be noted on the disk, too.
    if (the.index % 2 === 0) await takeCheckpoint(trainer, decide)
    else site.proxy.cut()
  }
  const outcome = await site.train('run', the.signal, { retries: 1, decide, onReceipt }).finally(() => site.close())
  return judgeUnwritable(outcome, the.reference, durability)
}

function asNobody(): { uid?: number } {
  return IS_ROOT ? { uid: NOBODY } : {}
}

function refusalOfUser(): string | undefined {
  const user = IS_ROOT ? { uid: NOBODY, gid: NOBODY } : {}
  const { status, stderr } = spawnSync(process.execPath, [PROGRAM, '--version'], user)
  return status === 0 ? undefined : `user ${NOBODY} cannot run the service (${String(stderr).trim().split('\n')[0]})`
}
