import tf, { type NamedTensorMap, type Scalar, type Tensor, type Variable } from '@tensorflow/tfjs-core'
import type { Client, OpenOptions, Receipt, Run, StepOptions } from './client.js'

/**
 * `groupOf` says which group a variable is in, by its name and shape; it may be left out where there is one group. All
 * else is as in `Client.open`.
 */
export type OptimizerOptions = Pick<OpenOptions, 'run' | 'mode' | 'takeover' | 'checkpoint' | 'from' | 'client'> & {
  groups: NonNullable<OpenOptions['groups']>
  variables: readonly Variable[]
  groupOf?: (name: string, shape: readonly number[]) => string
}

/** The values of a step; `skipped` are names of variables. Those without a gradient in the map are skipped, too. */
export type ApplyOptions = Pick<StepOptions, 'groups' | 'gradient_scale'>

/** Weights of a model of `@tensorflow/tfjs-layers`. */
export type Layers = { readonly trainableWeights: readonly { read(): Tensor }[] }

const MUON: ReadonlySet<unknown> = new Set(['muon', 'muonclip'])

/** The trainable variables of a model of `@tensorflow/tfjs-layers`, which has been built. */
export function variablesOf({ trainableWeights }: Layers): Variable[] {
  return trainableWeights.map((weight) => {
    const read = weight.read()
    if (read instanceof tf.Variable) return read
    throw new TypeError(`a weight of shape [${read.shape}] is no variable`)
  })
}

/**
 * An optimizer of TensorFlow.js whose steps the service computes. A step needs the network, so it is asynchronous:
 * `minimizeAsync` and `applyGradientsAsync`. The synchronous methods throw, and so does `model.fit` with it. The
 * variables hold the weights; the service holds the state.
 *
 * A variable of two dimensions in a group of Muon travels transposed: TensorFlow has (inputs, outputs) where torch, and
 * with it the service, has (outputs, inputs), and Muon's factor depends on which is which.
 */
export class ServiceOptimizer extends tf.Optimizer {
  static readonly className = 'ServiceOptimizer'
  readonly run: Run
  readonly #places: readonly Place[]

  /** Use `openOptimizer`. */
  constructor(run: Run, places: readonly Place[]) {
    super()
    this.run = run
    this.#places = places
  }

  /**
   * Takes one step with the gradients of `f`, a function of the variables; resolves to what `f` gives, which the caller
   * disposes of. @throws as `applyGradientsAsync`
   */
  async minimizeAsync(f: () => Scalar, options: ApplyOptions = {}): Promise<Scalar> {
    const { value, grads } = tf.variableGrads(
      f,
      this.#places.map(({ variable }) => variable),
    )
    try {
      await this.applyGradientsAsync(grads, options)
      return value
    } catch (error) {
      value.dispose()
      throw error
      /* c8 ignore next -- V8 counts the way on which the block before throws */
    } finally {
      tf.dispose(grads)
    }
  }

  /**
   * Takes one step with gradients by the names of the variables; one that is not there is skipped. The variables change
   * before it resolves. @throws MuondError as `Run.step`, RangeError for a name that is of no variable
   */
  async applyGradientsAsync(gradients: NamedTensorMap, options: ApplyOptions = {}): Promise<Receipt> {
    const known = new Set(this.#places.map(({ variable }) => variable.name))
    const unknown = Object.keys(gradients).find((name) => !known.has(name))
    if (unknown !== undefined) throw new RangeError(`there is a gradient '${unknown}', no variable has this name`)
    const given: Record<string, Float32Array> = {}
    for (const { variable, rows } of this.#places) {
      const gradient = gradients[variable.name]
      if (gradient) given[variable.name] = turned(await floatsOf(gradient), rows)
    }
    for (const { variable, data, rows } of this.#places) data.set(turned(await floatsOf(variable), rows))
    const skipped = [...known].filter((name) => !(name in given))
    try {
      return await this.run.step(given, { ...options, skipped })
    } finally {
      // Of a step that fails some updates may be applied, and the service goes on from those.
      for (const place of this.#places) assign(place)
    }
  }

  override applyGradients(): never {
    throw new Error('a step of this optimizer is asynchronous: await minimizeAsync or applyGradientsAsync')
  }

  /** As `applyGradients`. */
  override minimize(): never {
    return this.applyGradients()
  }

  getConfig(): tf.serialization.ConfigDict {
    return { run: this.run.opened.run }
  }
}

/** A variable and its weights as the client has them: transposed where `rows` says how many rows it has. */
type Place = { variable: Variable; data: Float32Array; rows: number | undefined }

/**
 * Opens a run for variables, whose names are those of the parameters.
 * @throws MuondError as `Client.open`, RangeError for a variable that is not float32, and for groups that do not fit
 */
export async function openOptimizer(client: Client, options: OptimizerOptions): Promise<ServiceOptimizer> {
  const { variables, groupOf, ...open } = options
  const [only] = open.groups
  if (!only || (open.groups.length > 1 && !groupOf))
    throw new RangeError(`there are ${open.groups.length} groups: say with groupOf which variable is in which`)
  const algorithms = new Map(open.groups.map(({ name, algorithm, preset }) => [name, algorithm ?? preset]))
  const placed = variables.map((variable) => {
    const { name, shape, dtype, size } = variable
    if (dtype !== 'float32') throw new RangeError(`variable '${name}' is ${dtype}, expected float32`)
    const group = groupOf ? groupOf(name, shape) : only.name
    const isTurned = MUON.has(algorithms.get(group)) && shape.length === 2
    const data = new Float32Array(size)
    const parameter = { name, shape: isTurned ? [...shape].reverse() : [...shape], group, data }
    return { parameter, place: { variable, data, rows: isTurned ? shape[0] : undefined } }
  })
  const run = await client.open({ ...open, parameters: placed.map(({ parameter }) => parameter) })
  return new ServiceOptimizer(
    run,
    placed.map(({ place }) => place),
  )
}

async function floatsOf(tensor: Tensor): Promise<Float32Array> {
  const values = await tensor.data()
  return Float32Array.from(values)
}

/** The transpose of a matrix of so many rows; without a number the values as they are. */
function turned(values: Float32Array, rows: number | undefined): Float32Array {
  if (rows === undefined) return values
  const columns = values.length / rows
  return values.map((_, i) => values[(i % rows) * columns + Math.floor(i / rows)])
}

function assign({ variable, data, rows }: Place): void {
  const values = turned(data.slice(), rows === undefined ? undefined : data.length / rows)
  tf.tidy(() => variable.assign(tf.tensor(values, variable.shape, 'float32')))
}
