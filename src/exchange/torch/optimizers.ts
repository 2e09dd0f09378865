import assert from 'node:assert'
import { NAMED_COEFFICIENTS } from '../../../kernels/orthogonalize/coefficients.js'
import type { StateGroup } from '../../store/checkpoint/state-source.js'
import type { ParameterDeclaration } from '../../wire/frame.js'
import { float, int, list, type Picklable, tuple } from './pickle.js'

/** A class of torch.optim. */
export type TorchClass = 'Muon' | 'AdamW' | 'Adam' | 'RMSprop' | 'SGD'

type Values = Readonly<Record<string, unknown>>

/** torch's defaults of the keys that say how torch computes a step, and change none of its numbers. */
const HOW: [string, Picklable][] = [
  ['maximize', false],
  ['foreach', null],
  ['capturable', false],
  ['differentiable', false],
]

const CLASSES: Readonly<Record<string, TorchClass>> = {
  muon: 'Muon',
  muonclip: 'Muon',
  adamw: 'AdamW',
  adam: 'Adam',
  rmsprop: 'RMSprop',
  sgd: 'SGD',
}

/** The class of torch.optim that has a group's algorithm. */
export function classOf({ algorithm }: StateGroup): TorchClass {
  const name = CLASSES[algorithm]
  assert(name, `algorithm ${algorithm} has a class of torch.optim`)
  return name
}

/** A group as an entry of param_groups, its keys in torch's order; without `params` and `param_names`. */
export function groupEntries(group: StateGroup): [string, Picklable][] {
  const { hyperparameters: of } = group
  const [beta1, beta2] = Array.isArray(of.betas) ? of.betas : []
  const number = (key: string): [string, Picklable] => [key, float(Number(of[key]))]
  const flag = (key: string): [string, Picklable] => [key, of[key] === true]
  switch (classOf(group)) {
    case 'Muon':
      return [
        ...[number('lr'), number('weight_decay'), number('momentum'), flag('nesterov')],
        ['ns_coefficients', tuple(...coefficients(of).map(float))],
        number('eps'),
        ['ns_steps', int(Number(of.ns_steps))],
        ['adjust_lr_fn', ADJUSTMENTS[String(of.adjust_lr_fn)]],
      ]
    case 'AdamW':
    case 'Adam':
      return [
        ...[number('lr'), ['betas', tuple(float(beta1), float(beta2))] as [string, Picklable]],
        ...[number('eps'), number('weight_decay'), flag('amsgrad'), ...HOW],
        ['fused', null],
        ['decoupled_weight_decay', classOf(group) === 'AdamW'],
      ]
    case 'RMSprop':
      return [
        ...[number('lr'), number('momentum'), number('alpha'), number('eps'), flag('centered'), number('weight_decay')],
        ...HOW,
      ]
    case 'SGD':
      return [
        ...[number('lr'), number('momentum'), number('dampening'), number('weight_decay'), flag('nesterov')],
        ...HOW.filter(([key]) => key !== 'capturable'),
        ['fused', null],
      ]
  }
}

/**
 * torch's value for each adjust_lr_fn. torch takes only the first three at construction; for a loaded one that it
 * does not know, such as 'none', it takes a factor of 1.
 */
const ADJUSTMENTS: Readonly<Record<string, string>> = {
  original: 'original',
  match_rms_adamw: 'match_rms_adamw',
  spectral: 'spectral_unclamped',
  none: 'none',
}

/** Why torch's optimizer cannot continue with a parameter's state, as a sentence; undefined where it can. */
export function obstacle({ name, shape, split, heads }: ParameterDeclaration, group: StateGroup): string | undefined {
  const { hyperparameters: of } = group
  const where = `parameter '${name}' of group '${group.name}'`
  switch (classOf(group)) {
    case 'Muon':
      if (shape.length !== 2) return `${where} has shape [${shape}], torch.optim.Muon takes two dimensions`
      if (split || heads) return `${where} is split into blocks, torch.optim.Muon takes it as one matrix`
      return muonObstacle(of, where)
    case 'SGD':
      if (of.weight_decay === 0) return undefined
      return `${where} has weight_decay ${of.weight_decay}, which torch.optim.SGD adds to the gradient`
    default:
      return undefined
  }
}

function muonObstacle(of: Values, where: string): string | undefined {
  if (of.second_momentum !== 'none')
    return `${where} has second_momentum ${of.second_momentum}, torch.optim.Muon has none`
  if (!Object.hasOwn(ADJUSTMENTS, String(of.adjust_lr_fn)))
    return `${where} has adjust_lr_fn '${of.adjust_lr_fn}', torch.optim.Muon knows ${Object.keys(ADJUSTMENTS).join(', ')}`
  if (coefficients(of).length === 3) return undefined
  return `${where} has ns_coefficients ${JSON.stringify(of.ns_coefficients)}, torch.optim.Muon takes three numbers`
}

/** The numbers of ns_coefficients, or of the set that it names: three for one triple, more for several triples. */
function coefficients({ ns_coefficients }: Values): number[] {
  const [, named] = Object.entries(NAMED_COEFFICIENTS).find(([name]) => name === ns_coefficients) ?? []
  const numbers: unknown[] = [named?.coefficients ?? ns_coefficients].flat(2)
  return numbers.filter((value) => typeof value === 'number')
}

/** Which state tensors, by muond's name, torch keeps for a parameter of this group, and whether it keeps a `step`. */
export function torchState(group: StateGroup): { tensors: (name: string) => boolean; step: boolean } {
  const { momentum } = group.hyperparameters
  switch (classOf(group)) {
    case 'Muon':
      return { tensors: () => true, step: false }
    case 'SGD':
      return { tensors: () => momentum !== 0, step: false }
    case 'RMSprop':
      return { tensors: (name) => name !== 'momentum_buffer' || momentum !== 0, step: true }
    default:
      return { tensors: () => true, step: true }
  }
}

/** The list of the `count` indices from `from` on: `params` of a param_group. */
export function indices(from: number, count: number): Picklable {
  return list(Array.from({ length: count }, (_, i) => int(from + i)))
}
