/* c8 ignore start -- needs a GPU: npm run test:gpu */

import { CUDA_KERNELS } from '../../../kernels/cuda/entry-points.js'
import { GEMM_CLUSTER, GEMM_KERNEL, GEMM_SHARED_BYTES, GEMM_THREADS } from '../../../kernels/cuda/gemm.js'
import { isPadded, paddedShape, planGemm } from '../../../kernels/cuda/gemm-plan.js'
import {
  listCost,
  newtonSchulzSteps,
  sizeOf,
  WORKSPACE_NAMES,
  type Workspace,
  workspaceOf,
} from '../../../kernels/cuda/newton-schulz.js'
import type { Triple } from '../../../kernels/orthogonalize/coefficients.js'
import { formFor } from '../../../kernels/orthogonalize/orthogonalize.js'
import { Cache } from '../cache.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda, CudaStream } from './cuda.js'
import type { Ends } from './gpu-job.js'
import type { LaunchLists } from './launch-lists.js'
import { blocksOf } from './pieces.js'
import { halfBytes, workspaceBytes } from './scratch.js'

/** The shape of a matrix of a list, and the coefficients of its Newton-Schulz. */
type ListedMatrix = Shape & { coefficients: readonly Triple[] }
type Launch = { problems: Pointer; tiles: Pointer; clusters: number; rounds: number }
/**
 * The Newton-Schulz of one list of matrices; good until another list has been prepared or the workspaces move. The
 * caller writes every x of `ends` before `run`, and the o have the results after it.
 */
type Program = { ends: Ends[]; padded: Padded[]; launches: Launch[]; memory: readonly Pointer[] }
/** A matrix without the zeros that its products have: X and then O at `plain`. */
type Padded = { rows: number; cols: number; plain: Pointer; x: Pointer; o: Pointer }
type Shape = { rows: number; cols: number }
type Parts = { cuda: Cuda; stream: CudaStream; lists: LaunchLists; form?: 'direct' | 'gram' }
type Addresses = { [Name in keyof Workspace]: Pointer }

const IN_HALF = { product: 'float16', input_scale: 1, output_scale: 1 } as const
// Lists of other shapes or coefficients have other programs; a training run has a few dozen.
const MAX_PROGRAMS = 128
// A tensor map starts on 64 bytes.
const PART_ALIGNMENT = 64

/**
 * Newton-Schulz of lists of matrices with products of our own (kernels/cuda/gemm.cu), for GPUs of compute capability
 * 9.0. Matrices whose sides are no multiples of 8 have zeros added for their products. The workspaces of a list lie one
 * behind the other in memory that every list uses anew.
 */
export class Hopper {
  readonly #cuda: Cuda
  readonly #stream: CudaStream
  readonly #lists: LaunchLists
  readonly #kernel: Pointer
  readonly #clusters: number
  readonly #programs: Cache<Program>
  readonly #texts = new WeakMap<readonly Triple[], string>()
  readonly #formFor: typeof formFor
  #memory = 0n

  /** `form` is the form of every shape, for benchmarks; left out: the one that formFor says. */
  constructor({ cuda, stream, lists, form }: Parts, cubin: Uint8Array) {
    this.#cuda = cuda
    this.#stream = stream
    this.#lists = lists
    this.#kernel = cuda.load(cubin)(GEMM_KERNEL)
    cuda.allowSharedMemory(this.#kernel, GEMM_SHARED_BYTES)
    this.#formFor = form ? () => form : formFor
    this.#clusters = Math.floor(cuda.multiprocessors / GEMM_CLUSTER)
    this.#programs = new Cache(MAX_PROGRAMS, ({ memory }) => {
      stream.synchronize()
      for (const pointer of memory) cuda.free(pointer)
    })
  }

  /** Sets the address of the workspaces, which have room for every list that comes (workspaceBytes). */
  moveTo(memory: Pointer): void {
    this.#programs.clear()
    this.#memory = memory
  }

  /** The program of a list; its `ends` are those of the list's matrices, in the list's order. */
  prepare(list: readonly ListedMatrix[]): Program {
    const key = list.map(({ rows, cols, coefficients }) => `${rows}x${cols} ${this.#text(coefficients)}`).join('|')
    return this.#programs.get(key, () => this.#build(list))
  }

  /** The time that lists of so many matrices like this one take, as listCost counts it. */
  costOf({ coefficients, ...shape }: ListedMatrix): (count: number) => number {
    return listCost(shape, coefficients, this.#clusters)
  }

  /** Queues the products of a list, whose every `x` has been written. */
  run({ launches, padded }: Program): void {
    for (const { plain, x, ...shape } of padded) this.#resize([plain, shape], [x, paddedShape(shape)])
    this.#lists.launch()
    for (const { problems, tiles, clusters, rounds } of launches) {
      const grid = { x: clusters * GEMM_CLUSTER, threads: GEMM_THREADS, shared: GEMM_SHARED_BYTES }
      this.#stream.launch(this.#kernel, grid, [problems, tiles, BigInt(rounds)])
    }
    for (const { plain, o, ...shape } of padded) this.#resize([o, paddedShape(shape)], [plain, shape])
    this.#lists.launch()
  }

  close(): void {
    this.#programs.clear()
  }

  #resize([from, before]: readonly [Pointer, Shape], [to, after]: readonly [Pointer, Shape]): void {
    this.#lists.add(CUDA_KERNELS.resize(), blocksOf(after.rows * after.cols), [
      ...[from, BigInt(before.rows), BigInt(before.cols)],
      ...[to, BigInt(after.rows), BigInt(after.cols)],
    ])
  }

  // The jobs of a list share their coefficients, whose text takes longer than all else of a key.
  #text(coefficients: readonly Triple[]): string {
    const text = this.#texts.get(coefficients) ?? String(coefficients)
    this.#texts.set(coefficients, text)
    return text
  }

  #build(list: readonly ListedMatrix[]): Program {
    let at = this.#memory
    const starts = list.map(({ rows, cols }) => {
      const start = at
      at += BigInt(workspaceBytes(rows, cols))
      return start
    })
    const shapes = list.map(paddedShape)
    const addresses = shapes.map((shape, i) => addressesOf(starts[i], shape))
    // A matrix without the zeros lies behind those that its products are of.
    const plains = shapes.map(({ rows, cols }, i) => starts[i] + BigInt(workspaceBytes(rows, cols)))
    const maps = this.#upload(shapes.flatMap((shape, i) => this.#encodeMaps(shape, addresses[i])))
    const workspaces = shapes.map((shape, i) => workspaceOf(shape, maps.slice(i * WORKSPACE_NAMES.length)))
    const steps = workspaces.map((workspace, i) => {
      const { rows, cols } = shapes[i]
      return newtonSchulzSteps(workspace, list[i].coefficients, this.#formFor(rows, cols))
    })
    const count = Math.max(...steps.map(({ launches }) => launches.length))
    const plans = Array.from({ length: count }, (_, i) => {
      return planGemm(
        steps.flatMap(({ launches }) => launches[i] ?? []),
        this.#clusters,
      )
    })
    const data = this.#upload(plans.flatMap(({ problems, tiles }) => [problems, tiles]))
    const products = addresses.map((own, i) => ({ x: own.x, o: own[steps[i].output] }))
    const places = list.map(({ rows, cols }, i) => ({ rows, cols, plain: plains[i], ...products[i] }))
    return {
      ends: places.map(({ plain, ...place }) => {
        const { x, o } = isPadded(place) ? { x: plain, o: plain } : place
        return { x, o, ...IN_HALF }
      }),
      padded: places.filter(isPadded),
      launches: plans.map(({ clusters, rounds }, i) => {
        return { problems: data[2 * i], tiles: data[2 * i + 1], clusters, rounds }
      }),
      memory: [maps[0], data[0]],
    }
  }

  #encodeMaps(shape: Shape, addresses: Addresses): Uint8Array[] {
    return WORKSPACE_NAMES.map((name) =>
      this.#cuda.encodeTensorMap({ pointer: addresses[name], ...sizeOf(name, shape) }),
    )
  }

  /**
   * Copies the parts into one allocation of device memory, and answers their addresses; the first is the allocation's.
   */
  #upload(parts: readonly Uint8Array[]): Pointer[] {
    const sizes = parts.map(({ length }) => aligned(length, PART_ALIGNMENT))
    let at = this.#cuda.allocate(sizes.reduce((sum, size) => sum + size, 0))
    return parts.map((part, i) => {
      const pointer = at
      this.#stream.upload(pointer, part)
      at += BigInt(sizes[i])
      return pointer
    })
  }
}

function addressesOf(start: Pointer, shape: Shape): Addresses {
  let at = start
  const entries = WORKSPACE_NAMES.map((name): [string, Pointer] => {
    const pointer = at
    at += BigInt(halfBytes(sizeOf(name, shape)))
    return [name, pointer]
  })
  return Object.fromEntries(entries) as Addresses
}
/* c8 ignore stop */
