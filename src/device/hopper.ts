/* c8 ignore start -- needs a GPU: npm run test:gpu */
import type { Triple } from '../../kernels/coefficients.js'
import { GEMM_CLUSTER, GEMM_KERNEL, GEMM_MAP_BYTES, GEMM_SHARED_BYTES, GEMM_THREADS } from '../../kernels/cuda/gemm.js'
import { type GemmMatrix, planGemm } from '../../kernels/cuda/gemm-plan.js'
import { newtonSchulzSteps, SLOT_SQUARE, SLOT_WIDE, type Slot } from '../../kernels/cuda/newton-schulz.js'
import type { Cuda, Stream, TensorMap } from './cuda.js'
import type { Pointer } from './onnxruntime.js'
import { aligned } from './staging.js'

/** One matrix of a list: `x` is to be written before `run`, `o` holds the result after it. */
export type Place = { x: Pointer; o: Pointer }

type Request = { rows: number; cols: number; coefficients: readonly Triple[] }
type Placed = { slot: Slot; pointers: Record<string, Pointer>; memory: Pointer }
type Launch = { problems: Pointer; tiles: Pointer; rounds: number }
type Program = { places: Place[]; launches: Launch[]; memory: Pointer }

const HALF_BYTES = 2
// A list of another composition has another program; a training run has a few dozen.
const MAX_PROGRAMS = 128
const ALIGNMENT = 256

/** Newton-Schulz of lists of matrices with products of our own (kernels/cuda/gemm.ts), for GPUs of compute capability 9.0. */
export class Hopper {
  readonly #cuda: Cuda
  readonly #stream: Stream
  readonly #kernel: Pointer
  readonly #clusters: number
  /** By shape: a list with three matrices of a shape uses its first three slots. */
  readonly #slots = new Map<string, Placed[]>()
  readonly #programs = new Map<string, Program>()

  constructor(cuda: Cuda, stream: Stream, cubin: Uint8Array) {
    this.#cuda = cuda
    this.#stream = stream
    this.#kernel = cuda.load(cubin)(GEMM_KERNEL)
    cuda.allowSharedMemory(this.#kernel, GEMM_SHARED_BYTES)
    this.#clusters = Math.floor(cuda.multiprocessors / GEMM_CLUSTER)
  }

  /** Where the matrices of a list lie, in the list's order. */
  places(list: readonly Request[]): Place[] {
    return this.#program(list).places
  }

  /** Queues the products of a list whose `x` are written. */
  run(list: readonly Request[]): void {
    const grid = { x: this.#clusters * GEMM_CLUSTER, threads: GEMM_THREADS, shared: GEMM_SHARED_BYTES }
    for (const { problems, tiles, rounds } of this.#program(list).launches)
      this.#stream.launch(this.#kernel, grid, [problems, tiles, BigInt(rounds)])
  }

  /** The stream has nothing left to do. */
  close(): void {
    for (const { memory } of this.#programs.values()) this.#cuda.free(memory)
    for (const { memory } of [...this.#slots.values()].flat()) this.#cuda.free(memory)
  }

  #program(list: readonly Request[]): Program {
    const key = list.map(({ rows, cols, coefficients }) => `${rows}x${cols} ${coefficients}`).join('|')
    const program = this.#programs.get(key) ?? this.#build(list)
    // A Map keeps the order of insertion, so its first entry is the least recently used one.
    this.#programs.delete(key)
    this.#programs.set(key, program)
    if (this.#programs.size > MAX_PROGRAMS) this.#dropOldest()
    return program
  }

  #build(list: readonly Request[]): Program {
    const used = new Map<string, number>()
    const steps = list.map(({ rows, cols, coefficients }) => {
      const shape = `${rows}x${cols}`
      const index = used.get(shape) ?? 0
      used.set(shape, index + 1)
      const { slot, pointers } = this.#slot({ rows, cols }, index)
      const { launches, output } = newtonSchulzSteps(slot, coefficients)
      return { launches, place: { x: pointers.x, o: pointers[output] } }
    })
    const count = Math.max(...steps.map(({ launches }) => launches.length))
    const plans = Array.from({ length: count }, (_, i) =>
      planGemm(
        steps.flatMap(({ launches }) => launches[i] ?? []),
        this.#clusters,
      ),
    )
    const bytes = plans.reduce(
      (sum, { problems, tiles }) => sum + aligned(problems.length, ALIGNMENT) + aligned(tiles.length, ALIGNMENT),
      0,
    )
    const memory = this.#cuda.allocate(bytes)
    let at = memory
    const upload = (data: Uint8Array) => {
      const to = at
      this.#stream.upload(to, data)
      at += BigInt(aligned(data.length, ALIGNMENT))
      return to
    }
    const launches = plans.map(({ problems, tiles, rounds }) => ({
      problems: upload(problems),
      tiles: upload(tiles),
      rounds,
    }))
    return { places: steps.map(({ place }) => place), launches, memory }
  }

  #slot({ rows, cols }: { rows: number; cols: number }, index: number): Placed {
    const key = `${rows}x${cols}`
    const slots = this.#slots.get(key) ?? []
    this.#slots.set(key, slots)
    slots[index] ??= this.#makeSlot(rows, cols)
    return slots[index]
  }

  #makeSlot(rows: number, cols: number): Placed {
    const side = Math.min(rows, cols)
    const shapes = [
      ...SLOT_WIDE.map((name) => ({ name, rows, cols })),
      ...SLOT_SQUARE.map((name) => ({ name, rows: side, cols: side })),
    ]
    const maps = aligned(shapes.length * GEMM_MAP_BYTES, ALIGNMENT)
    const bytes = shapes.reduce((sum, shape) => sum + aligned(shape.rows * shape.cols * HALF_BYTES, ALIGNMENT), maps)
    const memory = this.#cuda.allocate(bytes)
    let at = memory + BigInt(maps)
    const pointers: Record<string, Pointer> = {}
    const matrices = shapes.map((shape, i): [string, GemmMatrix] => {
      const map = memory + BigInt(i * GEMM_MAP_BYTES)
      const described: TensorMap = { pointer: at, rows: shape.rows, cols: shape.cols }
      this.#stream.upload(map, this.#cuda.encodeTensorMap(described))
      pointers[shape.name] = at
      at += BigInt(aligned(shape.rows * shape.cols * HALF_BYTES, ALIGNMENT))
      return [shape.name, { rows: shape.rows, cols: shape.cols, map }]
    })
    return { slot: Object.fromEntries(matrices) as Slot, pointers, memory }
  }

  #dropOldest(): void {
    const [[key, { memory }]] = this.#programs
    this.#stream.synchronize()
    this.#programs.delete(key)
    this.#cuda.free(memory)
  }
}
/* c8 ignore stop */
