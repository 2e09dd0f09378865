import { CUDA_KERNELS, mostItems } from '../../../kernels/cuda/entry-points.js'
import type { Triple } from '../../../kernels/orthogonalize/coefficients.js'
import { Cache } from '../cache.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda, CudaStream } from './cuda.js'
import type { Ends } from './gpu-job.js'
import type { LaunchLists } from './launch-lists.js'

const ITERATE_PARAMETERS = 6
/** The most matrices of a list: each has one block of threads for its iterations, and one launch has so many items. */
export const SMALL_TOGETHER = mostItems(ITERATE_PARAMETERS)
/** The longest shorter side of a matrix that kernels/cuda/small.cu takes. */
export const SMALL_SIDE = 64
// Positions of the longer side for a block, until there are as many blocks as one sums up afterwards.
const POSITIONS = 128
const MOST_BLOCKS = 128
const [SINGLE_BYTES, DOUBLE_BYTES] = [4, 8]
// R, P and M of small.cu.
const WORK_MATRICES = 3
const PART_ALIGNMENT = 256
/**
 * The largest product of the a² of iterations that go on from one XXᵀ: so much larger becomes the rounding of XXᵀ,
 * which is 1e-16. Of the named coefficients all iterations stay below it.
 */
const MOST_GROWTH = 1e10

/** Whether Newton-Schulz of a matrix is computed by small.cu. */
export function isSmall(rows: number, cols: number): boolean {
  return Math.min(rows, cols) <= SMALL_SIDE
}

/** Blocks of threads that share the longer side. They depend on the shape alone, and with them the order of sums. */
export function smallBlocks(rows: number, cols: number): number {
  return Math.min(MOST_BLOCKS, Math.ceil(Math.max(rows, cols) / POSITIONS))
}

/** Bytes of one matrix's workspace: X and O in float32, the blocks' parts of XXᵀ and three more squares in float64. */
export function smallBytes(rows: number, cols: number): number {
  const { x, o, grams, work } = sizesOf(rows, cols)
  return x + o + grams + work
}

/** The numbers of iterations that go on from one XXᵀ each, before it is computed anew of what X has become. */
export function segmentsOf(coefficients: readonly Triple[]): number[] {
  const segments: number[] = []
  let growth = 1
  for (const [a] of coefficients) {
    growth *= a * a
    if (segments.length === 0 || growth > MOST_GROWTH) {
      segments.push(0)
      growth = a * a
    }
    segments[segments.length - 1] += 1
  }
  return segments
}

function sizesOf(rows: number, cols: number) {
  const side = Math.min(rows, cols)
  const wide = aligned(rows * cols * SINGLE_BYTES, PART_ALIGNMENT)
  const squares = (count: number) => aligned(count * side * side * DOUBLE_BYTES, PART_ALIGNMENT)
  return { x: wide, o: wide, grams: squares(smallBlocks(rows, cols)), work: squares(WORK_MATRICES) }
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
/** The shape of a matrix, the coefficients of its Newton-Schulz and the address of its workspace. */
export type SmallMatrix = { rows: number; cols: number; coefficients: readonly Triple[]; memory: Pointer }

type Triples = { memory: Pointer; segments: readonly number[] }
type Work = SmallMatrix & {
  segments: readonly number[]
  triples: Pointer
  x: Pointer
  o: Pointer
  grams: Pointer
  work: Pointer
}

const TRIPLE_BYTES = 24
const IN_SINGLE = { product: 'float32', input_scale: 1, output_scale: 1 } as const

/** Newton-Schulz of lists of matrices with a small shorter side, on every card. */
export class SmallOrthogonalizer {
  readonly #stream: CudaStream
  readonly #cuda: Cuda
  readonly #lists: LaunchLists
  readonly #triples: Cache<Triples>
  readonly #texts = new WeakMap<readonly Triple[], string>()

  constructor(cuda: Cuda, stream: CudaStream, lists: LaunchLists) {
    this.#cuda = cuda
    this.#stream = stream
    this.#lists = lists
    // As many as a list has matrices: what a list uses is not freed before the list was launched.
    this.#triples = new Cache(SMALL_TOGETHER, ({ memory }) => {
      stream.synchronize()
      cuda.free(memory)
    })
  }

  /** Copies coefficients to the GPU, as later calls do where they are new. */
  prepare(coefficients: readonly Triple[]): void {
    this.#triplesOf(coefficients)
  }

  /** Where the caller writes each matrix's X = u/‖u‖ before `run`, and reads O after it. */
  endsOf(list: readonly SmallMatrix[]): Ends[] {
    return list.map((matrix) => {
      const { x, o, segments } = this.#workOf(matrix)
      return { x, o: segments.length % 2 === 1 ? o : x, ...IN_SINGLE }
    })
  }

  /** Queues the orthogonalization of a list, whose every X has been written. */
  run(list: readonly SmallMatrix[]): void {
    let works = list.map((matrix) => this.#workOf(matrix))
    for (let segment = 0; works.length > 0; segment++) {
      for (const work of works) this.#gram(work)
      this.#lists.launch()
      for (const work of works) this.#iterate(work, work.segments[segment])
      this.#lists.launch()
      for (const work of works) this.#apply(work)
      this.#lists.launch()
      works = works.filter(({ segments }) => segment + 1 < segments.length).map((work) => next(work, segment))
    }
  }

  close(): void {
    this.#triples.clear()
  }

  #gram(work: Work): void {
    this.#lists.add(CUDA_KERNELS.smallGram(), smallBlocks(work.rows, work.cols), [
      ...[work.x, work.grams],
      ...shapeOf(work),
    ])
  }

  #iterate({ rows, cols, grams, work, triples }: Work, count: number): void {
    const parts = BigInt(smallBlocks(rows, cols))
    const side = BigInt(Math.min(rows, cols))
    this.#lists.add(CUDA_KERNELS.smallIterate(), 1, [grams, parts, work, side, triples, BigInt(count)])
  }

  #apply(work: Work): void {
    const side = Math.min(work.rows, work.cols)
    const p = work.work + BigInt(side * side * DOUBLE_BYTES)
    this.#lists.add(CUDA_KERNELS.smallApply(), smallBlocks(work.rows, work.cols), [
      ...[p, work.x, work.o],
      ...shapeOf(work),
    ])
  }

  #workOf(matrix: SmallMatrix): Work {
    const sizes = sizesOf(matrix.rows, matrix.cols)
    const x = matrix.memory
    const o = x + BigInt(sizes.x)
    const grams = o + BigInt(sizes.o)
    const triples = this.#triplesOf(matrix.coefficients)
    const work = grams + BigInt(sizes.grams)
    return { ...matrix, x, o, grams, work, segments: triples.segments, triples: triples.memory }
  }

  #triplesOf(coefficients: readonly Triple[]): Triples {
    const text = this.#texts.get(coefficients) ?? String(coefficients)
    this.#texts.set(coefficients, text)
    return this.#triples.get(text, () => {
      const memory = this.#cuda.allocate(coefficients.length * TRIPLE_BYTES)
      this.#stream.upload(memory, new Uint8Array(Float64Array.from(coefficients.flat()).buffer))
      return { memory, segments: segmentsOf(coefficients) }
    })
  }
}

// A segment's O is the X of the next.
function next(work: Work, segment: number): Work {
  const triples = work.triples + BigInt(work.segments[segment] * TRIPLE_BYTES)
  return { ...work, x: work.o, o: work.x, triples }
}

function shapeOf({ rows, cols }: SmallMatrix): bigint[] {
  return [BigInt(Math.min(rows, cols)), BigInt(Math.max(rows, cols)), rows > cols ? 1n : 0n]
}
/* c8 ignore stop */
