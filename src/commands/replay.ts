import { mkdir, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ConfigError, configOf, type Environment, type Flags, readArguments } from '../config.js'
import { Device } from '../device/device.js'
import { OutputExistsError, writeWhole } from '../exchange/output.js'
import { readAlternative } from '../replay/alternative.js'
import { chartOf } from '../replay/chart.js'
import { type Recording, type Wanted, withRecording } from '../replay/recording.js'
import { jsonOf, type Report, reportOf, textOf } from '../replay/report.js'
import { CheckpointFiles } from '../store/checkpoint/checkpoint-files.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import { readPresets } from '../store/presets.js'
import { withPlainErrors } from './plain-errors.js'
import { presetsFolder } from './presets.js'
import { byteProgress, type Terminal } from './progress.js'

const HELP = `muond replay RUN --data DIR [--from CHECKPOINT] [--to STEP] [--groups FILE]
             [--every N] [--out FOLDER] [--json] [--device DEVICE]

Computes the journal of a run again, on the device, and holds every update and
digest against it. Ends with 1 at the first step that is another one, with the
parameter and both digests. The folder is only read: a service may be at work
there. Its journal goes back to the newest checkpoint, or, with the setting
--keep-journal, to the oldest one that is kept.

With --groups it computes beside that what other groups make of the same
gradients: another lr, another algorithm. docs/replay.md says how to read it.

  --data DIR      The data folder; also MUOND_DATA
  --from NAME     The id or a tag of the checkpoint to begin at; default is the
                  oldest one behind which the journal has every step
  --to STEP       The last step; default is the last one of the journal
  --groups FILE   Groups as \`open\` has them, YAML or JSON. One takes the
                  parameters of the run's group of its name, or those that its
                  \`parameters\` names, with * for any characters. With
                  \`lr_schedule: run\` its lr is the largest one, and goes as
                  that of the run does
  --every N       Tables have every N-th step, default is about 20 of them
  --out FOLDER    Writes replay.svg and replay.json there; it must not exist
  --json          Prints the facts as JSON
  --presets DIR   Folder with presets of your own; also MUOND_PRESETS
  --device NAME   auto, cpu, cuda, cuda:0 or cuda:0,1; also MUOND_DEVICE
  --help          Prints this`

const PLAIN = [UnreadableError, OutputExistsError]
/** Settings of the service that say how the device computes, with those that a variable may give. */
const DEVICE_SETTINGS = ['device', 'onnxruntime_dir', 'lanes', 'threads', 'staging_bytes', 'state_bytes_limit'] as const

type Asked = Wanted & { groups?: string; every?: number; out?: string; json: boolean }
/** `failed` is called where a step is not what the journal says: the process is to end with 1. */
type Means = { terminal: Terminal; width?: number; failed: () => void }

/**
 * `muond replay`: returns the report to print. Throws ConfigError for its arguments, and for what cannot be computed
 * again, with the reason.
 */
export async function replayCommand(argv: readonly string[], env: Environment, means: Means): Promise<string> {
  const { values, positionals } = readArguments(argv, {
    ...{ data: 'string', from: 'string', to: 'string', groups: 'string', every: 'string', out: 'string' },
    ...{ presets: 'string', device: 'string', json: 'boolean', help: 'boolean' },
  })
  if (values.help) return HELP
  const asked = askedOf(values, positionals, env)
  const settings = deviceSettings(values, env)
  return withPlainErrors(PLAIN, async () => {
    if (asked.out !== undefined) await checkFree(asked.out)
    const report = await compute(asked, settings, { presets: presetsFolder(values, env), terminal: means.terminal })
    if (report.replay.difference) means.failed()
    if (asked.out !== undefined) await write(asked.out, report)
    return asked.json ? JSON.stringify(jsonOf(report), null, 2) : textOf(report, asked.every, means.width)
  })
}

function askedOf(flags: Flags, [run, ...more]: readonly string[], { MUOND_DATA }: Environment): Asked {
  if (run === undefined || more.length > 0) throw new ConfigError('replay takes the name of one run (--help says more)')
  const data = textIn(flags, 'data') ?? MUOND_DATA
  if (!data) throw new ConfigError('--data is missing: the data folder that has the run')
  const [from, groups, out] = ['from', 'groups', 'out'].map((name) => textIn(flags, name))
  const [to, every] = ['to', 'every'].map((name) => numberIn(flags, name))
  return { data, run, from, to, groups, every, out: out?.replace(/\/+$/, ''), json: flags.json === true }
}

function textIn(flags: Flags, name: string): string | undefined {
  const value = flags[name]
  if (value === '') throw new ConfigError(`--${name} is empty`)
  return typeof value === 'string' ? value : undefined
}

function numberIn(flags: Flags, name: string): number | undefined {
  const value = textIn(flags, name)
  if (value === undefined) return undefined
  if (/^[1-9]\d{0,14}$/.test(value)) return Number(value)
  throw new ConfigError(`--${name} is '${value}', expected a whole number from 1 on`)
}

function deviceSettings({ device }: Flags, env: Environment): ReturnType<typeof configOf> {
  const given = DEVICE_SETTINGS.flatMap((name) => {
    const value = env[`MUOND_${name.toUpperCase()}`]
    return value ? [[name, value] as const] : []
  })
  return configOf({ ...Object.fromEntries(given), ...(typeof device === 'string' && { device }) })
}

async function checkFree(out: string): Promise<void> {
  if (await stat(out).catch(() => undefined)) throw new OutputExistsError(`${out} exists already`)
}

type With = { presets: string; terminal: Terminal }

async function compute(
  asked: Asked,
  settings: ReturnType<typeof configOf>,
  { presets, terminal }: With,
): Promise<Report> {
  const files = new CheckpointFiles()
  try {
    return await withRecording(asked, files, async (recording) => {
      const { groups } = asked
      const alternative =
        groups === undefined ? undefined : await readAlternative(groups, recording.declaration, readPresets(presets))
      const device = await Device.start(settings)
      const progress = byteProgress(`replaying run '${asked.run}':`, bytesOf(recording), terminal)
      try {
        return await reportOf(recording, { device, alternative, progress: progress.done })
      } finally {
        progress.end()
        await device.close()
      }
    })
  } finally {
    await files.close()
  }
}

function bytesOf({ scanned }: Recording): number {
  return scanned.reduce((sum, { bytes }) => sum + bytes, 0)
}

async function write(out: string, report: Report): Promise<void> {
  const chart = chartOf(report.replay, report.spikes)
  await writeWhole([out], async ([partial]) => {
    await mkdir(partial)
    await writeFile(join(partial, 'replay.json'), `${JSON.stringify(jsonOf(report))}\n`)
    if (chart !== undefined) await writeFile(join(partial, 'replay.svg'), chart)
  })
}
