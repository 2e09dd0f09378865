import { readFileSync } from 'node:fs'
import { ConfigError, type Environment, type Flags, readArguments } from '../config.js'
import { errorText } from '../errors.js'
import { ForeignError } from '../exchange/foreign/file-tensor.js'
import { type ForeignFile, ORIGINS, type Origin, openForeign } from '../exchange/foreign/foreign-file.js'
import type { components } from '../http/openapi.js'
import { type Group, groupOf, parseGroup } from '../optimizer/hyperparameters.js'
import { type Parameter, parseParameters } from '../optimizer/parameter.js'
import { UnreadableError } from '../store/checkpoint/manifest.js'
import { type Body, bodyOf } from './import-body.js'
import { type MatchBy, match } from './matching.js'
import { withPlainErrors } from './plain-errors.js'
import { byteProgress, type Terminal } from './progress.js'
import { getJson, putStream, type ServiceAddress, serviceOf } from './rest.js'

type Schemas = components['schemas']

const HELP = `muond import RUN FILE --from WHOSE [--url URL] [--token-file FILE]

Has a run of a service, which exists, go on from the optimizer state of a file:
all of it or nothing, between two steps.

  muond            An export, an index of shards or a checkpoint's folder
  torch-optimizer  torch.save(optimizer.state_dict()) of torch.optim's Muon,
                   AdamW, Adam, RMSprop or SGD: .pt or .pth
  moonlight        The same of MoonshotAI/Moonlight's Muon; its momentum is a
                   heavy ball
  keller-jordan    The same of KellerJordan/Muon since it has muon_update: its
                   momentum is an average (lerp_). Older ones, which take
                   adamw_params, are moonlight
  optax            optax.contrib.muon: .npz or safetensors with mu/<path>,
                   nu/<path> and count. An array has the shape that the run
                   has: a kernel of flax is the transpose of torch's weight

The three in the middle may also be safetensors, state.<parameter>.<tensor>.
A .pt is read by an interpreter that knows the few names a state dict needs;
it executes nothing and refuses everything else by its name.

  --order               Parameters are paired by their order among those with
                        the same kinds of tensors; without it, by their names
  --names FILE          A JSON map from names or indices in the file to names
                        of the run; the others keep theirs
  --key WORDS           Where the state dict is in a larger one: optimizer
  --momentum-form FORM  ema or heavy_ball, where it is not what WHOSE says
  --step N              Count of parameters whose optimizer keeps none;
                        default 1, and only SGD asks whether it is 0
  --partial             A parameter that the file does not have keeps its state
  --url URL             The service; default http://127.0.0.1:8787,
                        or of a Unix socket, ws+unix:///run/muond.sock
  --token-file FILE     Holds a key, scopes read and checkpoint; or MUOND_TOKEN
  --help                Prints this`

const FLAGS: Readonly<Record<string, 'string' | 'boolean'>> = {
  ...{ from: 'string', names: 'string', key: 'string', 'momentum-form': 'string', step: 'string' },
  ...{ url: 'string', 'token-file': 'string', order: 'boolean', partial: 'boolean', help: 'boolean' },
}

const PLAIN = [ForeignError, UnreadableError]

/** The form of Muon's buffer in each optimizer's files; those of muond state it. */
const FORMS: Readonly<Record<Origin, 'stated' | 'ema' | 'heavy_ball'>> = {
  muond: 'stated',
  'torch-optimizer': 'ema',
  moonlight: 'heavy_ball',
  'keller-jordan': 'ema',
  optax: 'ema',
}

type Declared = { groups: ReadonlyMap<string, Group>; parameters: Parameter[] }

/** `muond import`: imports a file and returns the report. Throws ConfigError, and then nothing was imported. */
export async function importCommand(
  argv: readonly string[],
  env: Environment,
  { terminal }: { terminal: Terminal },
): Promise<string> {
  const { values, positionals } = readArguments(argv, FLAGS)
  if (values.help) return HELP
  const [run, path, ...more] = positionals
  if (run === undefined || path === undefined || more.length > 0)
    throw new ConfigError('import takes the name of a run and a file (--help says more)')
  const origin = originOf(values)
  const by = matchByOf(values)
  const count = countOf(values)
  const service = serviceOf(values, env)
  const key = typeof values.key === 'string' ? values.key : undefined
  const file = await withPlainErrors(PLAIN, () => openForeign(path, origin, key))
  try {
    const declared = await declarationOf(service, run)
    const matches = match(file.states, declared.parameters, by, origin)
    const form = formOf(values, { origin, file, parameters: matches.map(({ parameter }) => parameter), declared })
    const metadata = statedForms(file, matches)
    const options = { origin, groups: declared.groups, count, metadata }
    const body = await withPlainErrors(PLAIN, async () => bodyOf(matches, options))
    const query = `partial=${values.partial === true}&momentum_form=${form}`
    const imported = await withPlainErrors(PLAIN, () =>
      send(service, `/v1/runs/${encodeURIComponent(run)}/state?${query}`, body, { run, terminal }),
    )
    return report(run, imported, body)
  } finally {
    await file.close()
  }
}

function originOf({ from }: Flags): Origin {
  const origin = ORIGINS.find((known) => known === from)
  if (origin) return origin
  throw new ConfigError(`--from is ${from ? `'${from}'` : 'missing'}, expected one of ${ORIGINS.join(', ')}`)
}

function matchByOf({ order, names }: Flags): MatchBy {
  if (typeof names !== 'string') return order ? { order: true } : { names: new Map() }
  if (order) throw new ConfigError('--order and --names exclude each other')
  return { names: readNames(names) }
}

function readNames(path: string): Map<string, string> {
  let given: unknown
  try {
    given = JSON.parse(readFileSync(path, 'utf8'))
  } catch (error) {
    throw new ConfigError(`${path} cannot be read: ${errorText(error)}`)
  }
  const entries =
    typeof given === 'object' && given !== null && !Array.isArray(given) ? Object.entries(given) : undefined
  const pairs = entries?.filter((pair): pair is [string, string] => typeof pair[1] === 'string')
  if (entries && pairs?.length === entries.length) return new Map(pairs)
  throw new ConfigError(`${path} is no map from names to names`)
}

function countOf({ step = '1' }: Flags): number {
  const count = Number(step)
  if (Number.isSafeInteger(count) && count > 0) return count
  throw new ConfigError(`--step is '${step}', expected an integer from 1 on`)
}

/** The `momentum_form` of the import. A file of muond has to state its own: throws ConfigError rather than guess. */
function formOf(
  flags: Flags,
  {
    origin,
    file,
    parameters,
    declared,
  }: { origin: Origin; file: ForeignFile; parameters: readonly Parameter[]; declared: Declared },
): string {
  const given = flags['momentum-form']
  if (given !== undefined && given !== 'ema' && given !== 'heavy_ball')
    throw new ConfigError(`--momentum-form is '${given}', expected ema or heavy_ball`)
  const form = given ?? FORMS[origin]
  const needed = parameters.find((parameter) => 'momentum_form' in groupOf(parameter, declared.groups).hyperparameters)
  if (form !== 'stated' || file.momentum_form !== undefined || needed === undefined) return form
  throw new ConfigError(
    `the file does not say what the momentum of '${needed.name}' is: give --momentum-form ema or heavy_ball`,
  )
}

/** The metadata `momentum_form` for the import: the file's own, under the names that its parameters have in the run. */
function statedForms({ momentum_form }: ForeignFile, matches: ReturnType<typeof match>): Record<string, string> {
  if (momentum_form === undefined) return {}
  if (!momentum_form.startsWith('{')) return { momentum_form }
  const forms: Record<string, unknown> = JSON.parse(momentum_form)
  const mapped = matches.flatMap(({ parameter, state }) => {
    const form = forms[state.key]
    return form === undefined ? [] : [[parameter.name, form] as const]
  })
  return { momentum_form: JSON.stringify(Object.fromEntries(mapped)) }
}

const PAGE = 10_000

/** The run's groups and parameters, asked from the service and checked as `open` checks them. */
async function declarationOf(service: ServiceAddress, run: string): Promise<Declared> {
  const path = `/v1/runs/${encodeURIComponent(run)}`
  const { groups: given } = await getJson<Schemas['Run']>(service, path)
  const parsed = Object.entries(given).map(([name, { preset: _, algorithm, ...hyperparameters }]): [string, Group] => [
    name,
    parseGroup({ name, algorithm: String(algorithm), ...hyperparameters }),
  ])
  const groups = new Map(parsed)
  const rows: Schemas['ParameterSummary'][] = []
  for (let more = true; more; ) {
    const page = await getJson<{ parameters: Schemas['ParameterSummary'][]; total: number }>(
      service,
      `${path}/parameters?offset=${rows.length}&limit=${PAGE}`,
    )
    rows.push(...page.parameters)
    more = page.parameters.length > 0 && rows.length < page.total
  }
  const declarations = rows.map(({ name, shape, group, split, heads, matrices }) => {
    return { name, shape, group, split, heads, matrices }
  })
  return { groups, parameters: parseParameters(declarations, groups) }
}

async function send(
  service: ServiceAddress,
  path: string,
  { bytes, pieces }: Body,
  { run, terminal }: { run: string; terminal: Terminal },
): Promise<Schemas['Imported']> {
  const progress = byteProgress(`importing into run '${run}':`, bytes, terminal)
  const watched = async function* () {
    for await (const piece of pieces) {
      yield piece
      progress.done(piece.length)
    }
    progress.end()
  }
  return putStream(service, path, { bytes, pieces: watched() })
}

function report(run: string, { step, digest, parameters, checkpoint }: Schemas['Imported'], { notes }: Body): string {
  const kept = checkpoint === undefined ? 'the service keeps no checkpoints' : `checkpoint ${checkpoint}`
  const count = `${parameters} parameter${parameters === 1 ? '' : 's'}`
  return [
    `run '${run}' goes on after step ${step} with the state of ${count}, digest ${digest}, ${kept}`,
    ...notes,
  ].join('\n')
}
