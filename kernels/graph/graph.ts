import type { OnnxInitializer, OnnxNode, OnnxValue } from './onnx.js'
import { type Attribute, type Dim, ELEMENT_TYPES, type ElementType, encodeModel } from './onnx.js'

export type { Attribute, Dim, ElementType } from './onnx.js'

export type Attributes = Readonly<Record<string, Attribute>>

export type GemmOptions = { c?: string; alpha?: number; beta?: number; transA?: boolean; transB?: boolean }

/**
 * A computation under construction. Every method that computes returns the name of its result, which later calls
 * take as input; `bytes()` gives the finished ONNX model.
 *
 * An operator is named as ONNX names it (`MatMul`); one of ONNX Runtime's own carries its domain
 * (`com.microsoft.FusedMatMul`). Throws if two values are given the same name.
 */
export class Graph {
  readonly #name: string
  readonly #names = new Set<string>()
  readonly #nodes: OnnxNode[] = []
  readonly #initializers: OnnxInitializer[] = []
  readonly #inputs: OnnxValue[] = []
  readonly #outputs: OnnxValue[] = []
  readonly #renamed = new Map<string, string>()

  constructor(name: string) {
    this.#name = name
  }

  /** A tensor that the caller of the model gives; names among `dims` are symbolic sizes. */
  input(name: string, dtype: ElementType, dims: readonly Dim[]): string {
    this.#inputs.push({ name: this.#claim(name), dtype, dims })
    return name
  }

  /** Names a value as an output of the model. Without `dims` its shape is left to inference. */
  output(name: string, value: string, type: { dtype?: ElementType; dims?: readonly Dim[] } = {}): void {
    const { dtype = 'float32', ...shape } = type
    this.#outputs.push({ name: this.#claim(name), dtype, ...shape })
    // An Identity node copies the tensor at run time, renaming it costs nothing. Only inputs, constants and values that
    // are outputs already need the node.
    const renamable = !this.#renamed.has(value) && this.#nodes.some((node) => node.outputs.includes(value))
    this.#renamed.set(renamable ? value : this.node('Identity', [value]), name)
  }

  /** Adds an operator with one result. An optional input that is left out is ''. */
  node(op: string, inputs: readonly string[], attributes: Attributes = {}): string {
    return this.#append(op, inputs, { attributes, outputs: [this.#fresh(op)] })[0]
  }

  /** Adds an operator with `count` results, such as Split. */
  nodeWithOutputs(
    op: string,
    inputs: readonly string[],
    options: { count: number; attributes?: Attributes },
  ): string[] {
    const outputs = Array.from({ length: options.count }, () => this.#fresh(op))
    return this.#append(op, inputs, { attributes: options.attributes ?? {}, outputs })
  }

  /** A float32 scalar (shape []). */
  constant(value: number): string {
    return this.floats([value], [])
  }

  /** A constant float32 tensor. */
  floats(values: Iterable<number>, dims: readonly number[]): string {
    return this.initializer('float32', dims, bytesOf(Float32Array.from(values)))
  }

  /** A constant vector of int64: axes, sizes, a shape. */
  ints(values: readonly number[]): string {
    return this.initializer('int64', [values.length], bytesOf(BigInt64Array.from(values, BigInt)))
  }

  /** A constant of any element type from raw little-endian bytes. */
  initializer(dtype: ElementType, dims: readonly number[], data: Uint8Array): string {
    const name = this.#fresh('constant')
    this.#initializers.push({ name, dtype, dims, data })
    return name
  }

  /** alpha·A·B + beta·C with either factor transposed; C broadcasts. Float attributes are rounded to float32. */
  gemm(a: string, b: string, options: GemmOptions = {}): string {
    const { c, alpha = 1, beta = 1, transA = false, transB = false } = options
    return this.node('Gemm', c === undefined ? [a, b] : [a, b, c], {
      alpha: { float: alpha },
      beta: { float: beta },
      transA: { int: Number(transA) },
      transB: { int: Number(transB) },
    })
  }

  add(a: string, b: string): string {
    return this.node('Add', [a, b])
  }

  sub(a: string, b: string): string {
    return this.node('Sub', [a, b])
  }

  mul(a: string, b: string): string {
    return this.node('Mul', [a, b])
  }

  div(a: string, b: string): string {
    return this.node('Div', [a, b])
  }

  /** Rounds to nearest, ties to even, where the new type is narrower. */
  cast(value: string, dtype: ElementType): string {
    return this.node('Cast', [value], { to: { int: ELEMENT_TYPES[dtype] } })
  }

  /** ReduceSum, ReduceMax, ReduceMean… over the given axes; without `axes` over all of them, to a scalar. */
  reduce(op: string, value: string, options: { axes?: readonly number[]; keepdims?: boolean } = {}): string {
    const { axes, keepdims = false } = options
    return this.node(op, axes === undefined ? [value] : [value, this.ints(axes)], {
      keepdims: { int: Number(keepdims) },
    })
  }

  /** The finished model: ModelProto bytes. */
  bytes(): Uint8Array {
    const named = (name: string) => this.#renamed.get(name) ?? name
    return encodeModel({
      name: this.#name,
      nodes: this.#nodes.map((node) => ({
        ...node,
        inputs: node.inputs.map(named),
        outputs: node.outputs.map(named),
      })),
      initializers: this.#initializers,
      inputs: this.#inputs,
      outputs: this.#outputs,
    })
  }

  #append<const Outputs extends readonly string[]>(
    op: string,
    inputs: readonly string[],
    rest: { attributes: Attributes; outputs: Outputs },
  ): Outputs {
    const dot = op.lastIndexOf('.')
    this.#nodes.push({ op: op.slice(dot + 1), domain: op.slice(0, Math.max(dot, 0)), inputs, ...rest })
    return rest.outputs
  }

  #fresh(kind: string): string {
    return this.#claim(`${kind}:${this.#names.size}`)
  }

  #claim(name: string): string {
    if (this.#names.has(name)) throw new Error(`graph '${this.#name}' already has a value named '${name}'`)
    this.#names.add(name)
    return name
  }
}

function bytesOf(values: Float32Array | BigInt64Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength)
}
