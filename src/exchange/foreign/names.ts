import { type FileTensor, ForeignError, type ForeignState, readNumber } from './file-tensor.js'

/** The states in tensors that are named `state.<parameter>.<tensor>`, in the order in which parameters first appear. */
export function fromStateNames(tensors: ReadonlyMap<string, FileTensor>): Promise<ForeignState[]> {
  const parameters = new Map<string, Map<string, FileTensor>>()
  for (const [name, tensor] of tensors) {
    const [, parameter, kind] = /^state\.(.+)\.([^.]+)$/s.exec(name) ?? []
    if (parameter === undefined || kind === undefined)
      throw new ForeignError(`tensor '${name}' has no name of the form state.<parameter>.<tensor>`)
    parameters.set(parameter, (parameters.get(parameter) ?? new Map()).set(kind, tensor))
  }
  return Promise.all([...parameters].map(([name, kinds]) => withCount(name, kinds)))
}

async function withCount(name: string, kinds: ReadonlyMap<string, FileTensor>): Promise<ForeignState> {
  const step = kinds.get('step')
  const count = step && (await readNumber(step, `'step' of parameter '${name}'`))
  return { key: name, name, count, tensors: new Map([...kinds].filter(([kind]) => kind !== 'step')) }
}

/**
 * The states in tensors of optax.contrib.muon, which are named `mu/<path>` and `nu/<path>`, with one `count` for all. A
 * parameter that has both was updated by adam, one with `mu` alone by muon.
 */
export async function fromOptaxNames(tensors: ReadonlyMap<string, FileTensor>): Promise<ForeignState[]> {
  const count = tensors.get('count')
  const steps = count && (await readNumber(count, `'count'`))
  const moments = new Map<string, { mu?: FileTensor; nu?: FileTensor }>()
  for (const [name, tensor] of tensors) {
    if (name === 'count') continue
    const [, kind, path] = /^(mu|nu)\/(.+)$/s.exec(name) ?? []
    if (path === undefined)
      throw new ForeignError(`tensor '${name}' has no name of the form mu/<path>, nu/<path> or count`)
    moments.set(path, { ...moments.get(path), [kind]: tensor })
  }
  return [...moments].map(([path, { mu, nu }]) => {
    if (mu === undefined) throw new ForeignError(`there is 'nu/${path}' but no 'mu/${path}'`)
    const kept: [string, FileTensor][] = nu
      ? [
          ['exp_avg', mu],
          ['exp_avg_sq', nu],
        ]
      : [['momentum_buffer', mu]]
    return { key: path, name: path, count: steps, tensors: new Map(kept) }
  })
}
