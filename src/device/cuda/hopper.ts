/* c8 ignore start -- needs a GPU: npm run test:gpu */

import { GEMM_CLUSTER, GEMM_KERNEL, GEMM_SHARED_BYTES, GEMM_THREADS } from '../../../kernels/cuda/gemm.js'
import { type GemmMatrix, planGemm } from '../../../kernels/cuda/gemm-plan.js'
import {
  newtonSchulzSteps,
  WORKSPACE_SQUARE,
  WORKSPACE_WIDE,
  type Workspace,
} from '../../../kernels/cuda/newton-schulz.js'
import type { Triple } from '../../../kernels/orthogonalize/coefficients.js'
import { Cache } from '../cache.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda, CudaStream } from './cuda.js'
import { ALIGNMENT, workspaceBytes } from './scratch.js'

/** Addresses for one matrix of a list: the caller writes `x` before `run`, and `o` has the result after it. */
export type Ends = { x: Pointer; o: Pointer }

/** The shape of a matrix of a list, and the coefficients of its Newton-Schulz. */
type ListedMatrix = { rows: number; cols: number; coefficients: readonly Triple[] }
type Launch = { problems: Pointer; tiles: Pointer; rounds: number }
/** The Newton-Schulz of one list of matrices; good until another list has been prepared or the workspaces move. */
type Program = { ends: Ends[]; launches: Launch[]; memory: readonly Pointer[] }
type Addresses = { [Name in keyof Workspace]: Pointer }

const HALF_BYTES = 2
// Lists of other shapes or coefficients have other programs; a training run has a few dozen.
const MAX_PROGRAMS = 128
// A tensor map starts on 64 bytes.
const PART_ALIGNMENT = 64
const WORKSPACE_NAMES = [...WORKSPACE_WIDE, ...WORKSPACE_SQUARE]

/**
 * Newton-Schulz of lists of matrices with products of our own (kernels/cuda/gemm.cu), for GPUs of compute capability
 * 9.0. The workspaces of a list lie one behind the other in memory that every list uses anew.
 */
export class Hopper {
  readonly #cuda: Cuda
  readonly #stream: CudaStream
  readonly #kernel: Pointer
  readonly #clusters: number
  readonly #programs: Cache<Program>
  readonly #texts = new WeakMap<readonly Triple[], string>()
  #memory = 0n

  constructor(cuda: Cuda, stream: CudaStream, cubin: Uint8Array) {
    this.#cuda = cuda
    this.#stream = stream
    this.#kernel = cuda.load(cubin)(GEMM_KERNEL)
    cuda.allowSharedMemory(this.#kernel, GEMM_SHARED_BYTES)
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

  /** Queues the products of a list, whose every `x` has been written. */
  run({ launches }: Program): void {
    const grid = { x: this.#clusters * GEMM_CLUSTER, threads: GEMM_THREADS, shared: GEMM_SHARED_BYTES }
    for (const { problems, tiles, rounds } of launches)
      this.#stream.launch(this.#kernel, grid, [problems, tiles, BigInt(rounds)])
  }

  close(): void {
    this.#programs.clear()
  }

  // The jobs of a list share their coefficients, whose text takes longer than all else of a key.
  #text(coefficients: readonly Triple[]): string {
    const text = this.#texts.get(coefficients) ?? String(coefficients)
    this.#texts.set(coefficients, text)
    return text
  }

  #build(list: readonly ListedMatrix[]): Program {
    let at = this.#memory
    const addresses = list.map(({ rows, cols }) => {
      const own = addressesOf(at, rows, cols)
      at += BigInt(workspaceBytes(rows, cols))
      return own
    })
    const maps = this.#upload(list.flatMap((matrix, i) => this.#encodeMaps(matrix, addresses[i])))
    const workspaces = list.map((matrix, i) => workspaceOf(matrix, maps.slice(i * WORKSPACE_NAMES.length)))
    const steps = workspaces.map((workspace, i) => newtonSchulzSteps(workspace, list[i].coefficients))
    const count = Math.max(...steps.map(({ launches }) => launches.length))
    const plans = Array.from({ length: count }, (_, i) => {
      return planGemm(
        steps.flatMap(({ launches }) => launches[i] ?? []),
        this.#clusters,
      )
    })
    const data = this.#upload(plans.flatMap(({ problems, tiles }) => [problems, tiles]))
    return {
      ends: addresses.map((own, i) => ({ x: own.x, o: own[steps[i].output] })),
      launches: plans.map(({ rounds }, i) => ({ problems: data[2 * i], tiles: data[2 * i + 1], rounds })),
      memory: [maps[0], data[0]],
    }
  }

  #encodeMaps({ rows, cols }: ListedMatrix, addresses: Addresses): Uint8Array[] {
    return WORKSPACE_NAMES.map((name) =>
      this.#cuda.encodeTensorMap({ pointer: addresses[name], ...sizeOf(name, rows, cols) }),
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

function sizeOf(name: keyof Workspace, rows: number, cols: number): { rows: number; cols: number } {
  const side = Math.min(rows, cols)
  return WORKSPACE_WIDE.some((wide) => wide === name) ? { rows, cols } : { rows: side, cols: side }
}

function addressesOf(start: Pointer, rows: number, cols: number): Addresses {
  let at = start
  const entries = WORKSPACE_NAMES.map((name): [string, Pointer] => {
    const pointer = at
    const size = sizeOf(name, rows, cols)
    at += BigInt(aligned(size.rows * size.cols * HALF_BYTES, ALIGNMENT))
    return [name, pointer]
  })
  return Object.fromEntries(entries) as Addresses
}

function workspaceOf({ rows, cols }: ListedMatrix, maps: readonly Pointer[]): Workspace {
  const entries = WORKSPACE_NAMES.map((name, i): [string, GemmMatrix] => [
    name,
    { ...sizeOf(name, rows, cols), map: maps[i] },
  ])
  return Object.fromEntries(entries) as Workspace
}
/* c8 ignore stop */
