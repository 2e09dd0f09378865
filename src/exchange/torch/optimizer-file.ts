import assert from 'node:assert'
import { extname } from 'node:path'
import { type SourceTensor, type StateGroup, type StateSource, stateName } from '../../store/checkpoint/state-source.js'
import { bytesOf, Elements } from '../../store/elements.js'
import type { ParameterDeclaration } from '../../wire/frame.js'
import { type OutputFile, writeFiles, writeWhole } from '../output.js'
import { readCounts } from './counts.js'
import { classOf, groupEntries, indices, obstacle, type TorchClass, torchState } from './optimizers.js'
import { dict, int, list, type Picklable } from './pickle.js'
import { TorchFile, tensorNode } from './tensor.js'

/** A parameter in a file; `index` is its key in torch's state dict, counted over the file's parameters. */
type Row = { parameter: ParameterDeclaration; group: StateGroup; index: number; tensors: readonly SourceTensor[] }
/** The file of one class of torch.optim, and the parameters that go into it. */
type FilePlan = { name: TorchClass; rows: Row[] }

export type TorchFiles = {
  /** The file of each class, in the order of the run's groups; `parameters` are in the order of torch's state dict. */
  files: { name: TorchClass; path: string; parameters: string[] }[]
  /** A sentence for each parameter that is in no file, which says why. */
  left_out: string[]
}

/** torch's optimizers cannot hold some parameters; the message has a line for each of these. */
export class NotTorchError extends Error {
  override readonly name = 'NotTorchError'
}

/**
 * Writes a state as state dicts of torch.optim's optimizers, for torch.load and load_state_dict: one file for each
 * class, named `path`, or `<path>.<class>.<extension>` where there are several. Its param_groups are the run's groups
 * of that class and keep the run's order, as the parameters in them do.
 * Throws NotTorchError for a parameter that torch cannot hold, unless `partial`, and OutputExistsError.
 */
export async function writeTorchOptimizer(
  path: string,
  source: StateSource,
  { partial }: { partial: boolean },
): Promise<TorchFiles> {
  const { plans, left_out } = planOf(source)
  if (plans.length === 0 || (left_out.length > 0 && !partial)) throw new NotTorchError(left_out.join('\n'))
  const extension = extname(path)
  const stem = path.slice(0, path.length - extension.length)
  const paths = plans.length === 1 ? [path] : plans.map(({ name }) => `${stem}.${name}${extension}`)
  await writeWhole(paths, (partials) => writeFiles(partials, (files) => write(files, plans, source)))
  const files = plans.map(({ name, rows }, i) => {
    return { name, path: paths[i], parameters: rows.map(({ parameter }) => parameter.name) }
  })
  return { files, left_out }
}

function planOf({ description: { groups, parameters }, tensors }: StateSource): {
  plans: FilePlan[]
  left_out: string[]
} {
  const plans = new Map<TorchClass, FilePlan>()
  const left_out: string[] = []
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]))
  for (const group of groups) {
    const name = classOf(group)
    const plan = plans.get(name) ?? { name, rows: [] }
    const members = parameters.filter((parameter) => parameter.group === group.name)
    for (const parameter of members) {
      const reason = obstacle(parameter, group)
      if (reason) left_out.push(reason)
      else plan.rows.push({ parameter, group, index: plan.rows.length, tensors: tensorsOf(parameter, group, byName) })
    }
    if (plan.rows.length > 0) plans.set(name, plan)
  }
  return { plans: [...plans.values()], left_out }
}

/** The state tensors that torch has a name for, in the order of torch's state dicts. */
const KEPT = ['momentum_buffer', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'square_avg'] as const

function tensorsOf(
  { name }: ParameterDeclaration,
  group: StateGroup,
  byName: ReadonlyMap<string, SourceTensor>,
): SourceTensor[] {
  const keeps = torchState(group).tensors
  return KEPT.filter(keeps).flatMap((tensor) => byName.get(stateName(name, tensor)) ?? [])
}

async function write(files: readonly OutputFile[], plans: readonly FilePlan[], source: StateSource): Promise<void> {
  const { counts, rest } = await readCounts(source)
  const torchFiles: TorchFile[] = []
  for (const [i, plan] of plans.entries()) {
    torchFiles.push(await TorchFile.begin((bytes) => files[i].write(bytes), stateDict(plan, counts)))
    await writeSteps(torchFiles[i], plan, counts)
  }
  await writeTensors(torchFiles, plans, rest)
  for (const file of torchFiles) await file.end()
}

/** {'state': {index: {…}}, 'param_groups': [{…, 'params': [index…]}…]}, as `Optimizer.state_dict` returns it. */
function stateDict({ rows }: FilePlan, counts: ReadonlyMap<string, number>): Picklable {
  const stepped = rows.filter(({ tensors, parameter }) => tensors.length > 0 && countOf(parameter, counts) > 0)
  const state = stepped.map(({ index, group, parameter, tensors }): [Picklable, Picklable] => {
    const step: [Picklable, Picklable][] = torchState(group).step
      ? [['step', tensorNode({ dtype: 'F32', shape: [] }, stateName(parameter.name, 'step'))]]
      : []
    const kept = tensors.map((tensor): [Picklable, Picklable] => {
      return [tensor.name.slice(stateName(parameter.name, '').length), tensorNode(tensor, tensor.name)]
    })
    return [int(index), dict([...step, ...kept])]
  })
  const groups = [...new Set(rows.map(({ group }) => group))].map((group) => {
    const members = rows.filter((row) => row.group === group)
    const names = list(members.map(({ parameter }) => parameter.name))
    return dict([...groupEntries(group), ['params', indices(members[0].index, members.length)], ['param_names', names]])
  })
  return dict([
    ['state', dict(state)],
    ['param_groups', list(groups)],
  ])
}

/** How many updates were applied to a parameter. */
export function countOf({ name }: ParameterDeclaration, counts: ReadonlyMap<string, number>): number {
  const count = counts.get(stateName(name, 'step'))
  assert(count !== undefined, `the state says how often '${name}' was applied`)
  return count
}

/** Writes the `step` of each parameter whose optimizer has one: torch keeps it as a float32. */
async function writeSteps(file: TorchFile, { rows }: FilePlan, counts: ReadonlyMap<string, number>): Promise<void> {
  for (const { parameter, group, tensors } of rows) {
    if (!torchState(group).step || tensors.length === 0) continue
    const bytes = bytesOf(Float32Array.of(countOf(parameter, counts)))
    const entry = await file.storage(stateName(parameter.name, 'step'), bytes.length)
    await entry.write(bytes)
    await entry.end()
  }
}

async function writeTensors(
  files: readonly TorchFile[],
  plans: readonly FilePlan[],
  pieces: AsyncIterable<{ tensor: SourceTensor; piece: Uint8Array }>,
): Promise<void> {
  const places = new Map(
    plans.flatMap(({ rows }, i) =>
      rows.flatMap(({ group, tensors }) => tensors.map((tensor) => [tensor, { file: files[i], group }] as const)),
    ),
  )
  let open: { tensor: SourceTensor; storage: Awaited<ReturnType<TorchFile['storage']>>; elements: Elements } | undefined
  for await (const { tensor, piece } of pieces) {
    const place = places.get(tensor)
    if (place === undefined) continue
    if (open?.tensor !== tensor) {
      await open?.storage.end()
      const storage = await place.file.storage(tensor.name, tensor.bytes)
      open = { tensor, storage, elements: emaElements(tensor, place.group) }
    }
    await open.storage.write(bytesOf(open.elements.take(piece)))
  }
  await open?.storage.end()
}

/**
 * Converts a state tensor to torch's form, piece by piece. torch.optim.Muon's buffer is an exponential average
 * (`ema`); a `heavy_ball` one is 1 / (1 - momentum) times as large.
 */
export function emaElements({ name, dtype }: SourceTensor, { hyperparameters }: StateGroup): Elements {
  assert(dtype === 'F32' || dtype === 'BF16', `tensor '${name}' is ${dtype}`)
  const { momentum_form, momentum } = hyperparameters
  const ball = momentum_form === 'heavy_ball' && name.endsWith('.momentum_buffer')
  return new Elements({ from: dtype, to: dtype, ...(ball && { multiply: 1 - Number(momentum) }) })
}
