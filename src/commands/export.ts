import { ConfigError, type Environment, type Flags, readArguments } from '../config.js'
import { OutputExistsError } from '../exchange/output.js'
import { writeSafetensors } from '../exchange/safetensors-files.js'
import { writeDcp } from '../exchange/torch/dcp-folder.js'
import { NotTorchError, type TorchFiles, writeTorchOptimizer } from '../exchange/torch/optimizer-file.js'
import { findCheckpoint, openCheckpoint } from '../store/checkpoint/checkpoint-source.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import type { StateSource } from '../store/checkpoint/state-source.js'
import { tableLines } from '../text-table.js'
import { amount } from './amount.js'
import { withPlainErrors } from './plain-errors.js'
import { byteProgress, type Terminal } from './progress.js'
import { serviceOf } from './rest.js'
import { openRun } from './rest-source.js'

const HELP = `muond export RUN --to FORMAT --out PATH [--url URL] [--token-file FILE]
muond export RUN --to FORMAT --out PATH --data DIR [--checkpoint ID|TAG]

Writes the optimizer state of a run, as it is after its last finished step, or
as a checkpoint has it. PATH must not exist.

  safetensors      One file, names as in a checkpoint; beyond 4 GiB shards
                   beside it and an index. \`muond import\` reads it back.
  torch-optimizer  What torch.load(PATH, weights_only=True) reads and
                   load_state_dict of torch.optim's Muon, AdamW, Adam, RMSprop
                   or SGD takes. A run with several of them gives a file each,
                   PATH with the class before its extension. Construct the
                   optimizer with a param_group for each group of the run and
                   the parameters in the order that is printed.
  torch-dcp        A folder for torch.distributed.checkpoint.load, flattened
                   names: state.<parameter>.exp_avg, param_groups.<parameter>.lr

Muon's momentum is written to torch's formats as torch.optim.Muon keeps it
(ema): a heavy_ball buffer times 1 - momentum.

  --url URL          The service; default http://127.0.0.1:8787,
                     or of a Unix socket, ws+unix:///run/muond.sock
  --token-file FILE  Holds a key, scope read; also the variable MUOND_TOKEN
  --data DIR         A data folder instead of a service. Every file is held
                     against its hash; a service may be at work there
  --checkpoint NAME  Its id or a tag; default is the newest
  --partial          torch-optimizer: leaves out what torch cannot hold, and
                     says so; without it nothing is written then
  --help             Prints this`

const FORMATS = ['safetensors', 'torch-dcp', 'torch-optimizer'] as const
type Format = (typeof FORMATS)[number]

const SHARD_BYTES = 2 ** 32
const PLAIN = [UnreadableError, OutputExistsError, NotTorchError]

/** `muond export`: writes files and returns the report to print. Throws ConfigError, and then nothing was written. */
export async function exportCommand(
  argv: readonly string[],
  env: Environment,
  { terminal, shard_bytes = SHARD_BYTES }: { terminal: Terminal; shard_bytes?: number },
): Promise<string> {
  const { values, positionals } = readArguments(argv, {
    ...{ to: 'string', out: 'string', url: 'string', 'token-file': 'string', data: 'string', checkpoint: 'string' },
    ...{ partial: 'boolean', help: 'boolean' },
  })
  if (values.help) return HELP
  const { run, format, out } = asked(values, positionals)
  const source = await withPlainErrors(PLAIN, () => openSource(run, values, env))
  try {
    const watched = watch(source, `exporting run '${run}':`, terminal)
    const writing = { format, out, shard_bytes, partial: values.partial === true }
    const written = await withPlainErrors(PLAIN, () => write(watched, writing))
    const { step, digest } = source.description
    return [`run '${run}' at step ${step}, digest ${digest}`, ...written].join('\n')
  } finally {
    await source.close()
  }
}

function asked({ to, out }: Flags, [run, ...more]: readonly string[]): { run: string; format: Format; out: string } {
  if (run === undefined || more.length > 0) throw new ConfigError('export takes the name of one run (--help says more)')
  const format = FORMATS.find((known) => known === to)
  if (format === undefined)
    throw new ConfigError(`--to is ${to ? `'${to}'` : 'missing'}, expected one of ${FORMATS.join(', ')}`)
  if (typeof out !== 'string' || out === '') throw new ConfigError('--out is missing: the path to write to')
  return { run, format, out: out.replace(/\/+$/, '') }
}

async function openSource(run: string, flags: Flags, env: Environment): Promise<StateSource> {
  const { data, checkpoint } = flags
  if (typeof data === 'string') {
    if (flags.url !== undefined) throw new ConfigError('--data and --url exclude each other')
    return openCheckpoint(await findCheckpoint(data, run, typeof checkpoint === 'string' ? checkpoint : undefined))
  }
  if (checkpoint !== undefined) throw new ConfigError('--checkpoint goes with --data')
  return openRun(serviceOf(flags, env), run)
}

/** The same state; reading it shows on the terminal how much is done. */
function watch(source: StateSource, what: string, terminal: Terminal): StateSource {
  const total = source.tensors.reduce((sum, { bytes }) => sum + bytes, 0)
  const read = async function* () {
    const progress = byteProgress(what, total, terminal)
    for await (const part of source.read()) {
      yield part
      progress.done(part.piece.length)
    }
    progress.end()
  }
  return { ...source, read }
}

type Writing = { format: Format; out: string; shard_bytes: number; partial: boolean }

async function write(source: StateSource, { format, out, shard_bytes, partial }: Writing): Promise<string[]> {
  const total = source.tensors.reduce((sum, { bytes }) => sum + bytes, 0)
  switch (format) {
    case 'safetensors':
      return [...(await writeSafetensors(out, source, shard_bytes)), `${amount(total, 'B')} of state`]
    case 'torch-dcp':
      return [...(await writeDcp(out, source)), `${amount(total, 'B')} of state`]
    case 'torch-optimizer':
      return torchLines(await writeTorchOptimizer(out, source, { partial }))
  }
}

function torchLines({ files, left_out }: TorchFiles): string[] {
  const rows = files.flatMap(({ name, path, parameters }) =>
    parameters.map((parameter, i) => [i === 0 ? path : '', i === 0 ? `torch.optim.${name}` : '', String(i), parameter]),
  )
  const head = ['file', 'optimizer', 'index', 'parameter']
  const table = tableLines({ head, align: ['left', 'left', 'right', 'left'], rows })
  return [...table, ...left_out.map((reason) => `left out: ${reason}`)]
}
