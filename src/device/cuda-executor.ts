/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { CUDA_KERNELS, MAX_BLOCKS, THREADS, VECTOR } from '../../kernels/cuda/source.js'
import { bytesPerElement, type Dtype } from '../../kernels/dtype.js'
import type { KernelSpec } from '../../kernels/kernel.js'
import type { Task } from '../optimizer/plan.js'
import { type Cuda, openCuda, type Stream } from './cuda.js'
import { addressOf, type Executor, type HostRange, type Job, type JobResult, type Need } from './job.js'
import { type Pointer, viewMemory } from './onnxruntime.js'
import { Orthogonalizer } from './orthogonalizer.js'

/** `cubin` is the machine code of CUDA_SOURCE for this GPU, `folder` that of libonnxruntime and its CUDA provider. */
export type CudaLane = { kind: 'cuda'; folder: string; gpu: number; cubin: Uint8Array }

type MuonSpec = Extract<KernelSpec, { kind: 'muon' }>

/** Matrices of one shape that lie one behind the other; the whole tensor where the algorithm is elementwise. */
type Group = { spec: KernelSpec; rows: number; cols: number; offset: number; count: number; factor: number }

type Memory = { gradient: Pointer; update: Pointer; partials: Pointer }

type ScratchName = 'gradient' | 'update' | 'x' | 'o' | 'partials'

// The layout of Partial and Result in CUDA_SOURCE.
const PARTIAL_BYTES = 32
const RESULT_BYTES = 40
const PACKS_PER_THREAD = 4
const MOMENTUM_SCALARS = ['gradient_scale', 'c_m', 'c_g', 'n_m', 'n_g']
const ADAMW_SCALARS = ['gradient_scale', 'a_m', 'a_g', 'b_v', 'b_g', 'bias1', 'bias2_sqrt', 'eps']

/**
 * Computes jobs on a GPU: gradients and updates in page-locked host memory, state in device memory. The elementwise parts
 * are kernels of our own, the matrix products ONNX Runtime's, all of them on one stream; a job waits for it once.
 */
export class CudaExecutor implements Executor {
  readonly #cuda: Cuda
  readonly #stream: Stream
  readonly #find: (name: string) => Pointer
  readonly #kernels = new Map<string, Pointer>()
  readonly #orthogonalizer: Orthogonalizer
  readonly #result: { pointer: Pointer; view: DataView }
  /** Device memory that grows to what the largest job needs. */
  readonly #scratch = new Map<ScratchName, { pointer: Pointer; bytes: number }>()

  constructor({ folder, gpu, cubin }: CudaLane) {
    this.#cuda = openCuda(gpu)
    this.#stream = this.#cuda.createStream()
    this.#find = this.#cuda.load(cubin)
    this.#orthogonalizer = new Orthogonalizer(folder, gpu, this.#stream)
    const pointer = this.#cuda.allocateHost(RESULT_BYTES)
    this.#result = { pointer, view: new DataView(viewMemory(pointer, RESULT_BYTES).buffer) }
  }

  /** Runs every Newton-Schulz once: the first run of a size allocates, and cuBLAS chooses its kernels. */
  load(needs: readonly Need[]): void {
    for (const { kernel, dims } of needs) {
      if (kernel.kind === 'muon') this.#orthogonalizer.run(kernel.coefficients, this.#matrices(dims[0], dims[1]))
    }
    this.#stream.synchronize()
  }

  run(job: Job): JobResult {
    const started = performance.now()
    try {
      this.#queue(job)
    } finally {
      // Also after a failure: what was queued still writes into memory that the run is about to give away.
      this.#stream.synchronize()
    }
    return this.#judge(job, started)
  }

  forget(): void {}

  close(): void {
    this.#stream.synchronize()
    this.#orthogonalizer.close()
    for (const { pointer } of this.#scratch.values()) this.#cuda.free(pointer)
    this.#cuda.freeHost(this.#result.pointer)
    this.#stream.destroy()
  }

  #queue(job: Job): void {
    const { gradient_dtype, update_dtype } = job.plan.kernel
    const groups = grouped(job)
    const gradient = this.#resident('gradient', job.gradient)
    const update = this.#resident('update', job.update)
    const checkBlocks = groups.reduce((sum, group) => sum + group.count * blocksFor(group), 0)
    const partials = this.#reserve('partials', (2 * MAX_BLOCKS + checkBlocks) * PARTIAL_BYTES)
    const [scans, checks] = [partials, partials + BigInt(2 * MAX_BLOCKS * PARTIAL_BYTES)]
    const updateScans = scans + BigInt(MAX_BLOCKS * PARTIAL_BYTES)

    if (!job.gradient.block.resident) this.#stream.copy(gradient, addressOf(job.gradient), job.gradient.bytes)
    const scanned = this.#scan(gradient, { bytes: job.gradient.bytes, dtype: gradient_dtype, partials: scans })
    let at = checks
    for (const group of groups) {
      this.#compute(job, group, { gradient, update, partials: at })
      at += BigInt(group.count * blocksFor(group) * PARTIAL_BYTES)
    }
    const sent = this.#scan(update, { bytes: job.update.bytes, dtype: update_dtype, partials: updateScans })
    this.#launch(CUDA_KERNELS.collect(), { x: 1 }, [
      ...[scans, BigInt(scanned), BigInt(job.gradient.bytes)],
      ...[updateScans, BigInt(sent), BigInt(job.update.bytes)],
      ...[checks, BigInt(checkBlocks), this.#result.pointer],
    ])
    if (!job.update.block.resident) this.#stream.copy(addressOf(job.update), update, job.update.bytes)
  }

  #judge({ expected }: Job, started: number): JobResult {
    const { view } = this.#result
    const result = {
      gradientFingerprint: view.getBigUint64(0, true),
      updateFingerprint: view.getBigUint64(8, true),
      gradientSquare: view.getFloat64(16, true),
      updateSquare: view.getFloat64(24, true),
      computeSeconds: (performance.now() - started) / 1000,
    }
    if (expected !== undefined && expected !== result.gradientFingerprint)
      return { ...result, outcome: 'other_gradient' }
    const finite = [result.gradientSquare, result.updateSquare, view.getFloat64(32, true)].every(Number.isFinite)
    return { ...result, outcome: finite ? 'computed' : 'not_finite' }
  }

  #compute(job: Job, group: Group, memory: Memory): void {
    const { spec } = group
    switch (spec.kind) {
      case 'muon':
        return this.#muon(job, { ...group, spec }, memory)
      case 'adamw':
      case 'sgd':
        return this.#elementwise(job, group, memory)
    }
  }

  #elementwise(job: Job, group: Group, { gradient, update, partials }: Memory): void {
    const { kind, gradient_dtype, update_dtype } = group.spec
    const kernels = { adamw: CUDA_KERNELS.adamw, sgd: CUDA_KERNELS.sgd, muon: CUDA_KERNELS.sgd }
    const names = kind === 'adamw' ? ADAMW_SCALARS : MOMENTUM_SCALARS
    const state = job.next.map((_, i) => job.state?.[i] ?? 0n)
    this.#launch(kernels[kind](gradient_dtype, update_dtype), { x: blocksFor(group) }, [
      ...[gradient, ...state, ...job.next, update, BigInt(group.rows * group.cols)],
      ...[...names.map((name) => scalarOf(job, name)), partials],
    ])
  }

  #muon(job: Job, group: Group & { spec: MuonSpec }, memory: Memory): void {
    const { rows, cols, count, offset, factor, spec } = group
    const { gradient_dtype, update_dtype, coefficients } = spec
    const vector = packOf(group) > 1
    const blocks = blocksFor(group)
    const packs = BigInt((rows * cols) / packOf(group))
    const scalars = MOMENTUM_SCALARS.map((name) => scalarOf(job, name))
    const at = (base: Pointer, index: number, dtype: Dtype) =>
      base && base + BigInt((offset + index * rows * cols) * bytesPerElement(dtype))
    const buffer = job.state?.[0] ?? 0n
    this.#launch(CUDA_KERNELS.momentum(gradient_dtype, vector), { x: blocks, y: count }, [
      ...[at(memory.gradient, 0, gradient_dtype), at(buffer, 0, 'float32'), at(job.next[0], 0, 'float32'), packs],
      ...[...scalars, memory.partials],
    ])
    const matrices = this.#matrices(rows, cols)
    const { input_scale, output_scale } = this.#orthogonalizer.scales(coefficients, matrices)
    for (let index = 0; index < count; index++) {
      this.#launch(CUDA_KERNELS.normalize(gradient_dtype, vector), { x: blocks }, [
        ...[at(memory.gradient, index, gradient_dtype), at(job.next[0], index, 'float32'), matrices.x, packs],
        ...[...scalars, scalarOf(job, 'eps'), input_scale],
        ...[memory.partials + BigInt(index * blocks * PARTIAL_BYTES), BigInt(blocks)],
      ])
      this.#orthogonalizer.run(coefficients, matrices)
      this.#launch(CUDA_KERNELS.finish(update_dtype, vector), { x: blocks }, [
        ...[matrices.o, at(memory.update, index, update_dtype), packs, factor * output_scale],
      ])
    }
  }

  /** Answers how many blocks have left a partial sum. */
  #scan(pointer: Pointer, { bytes, dtype, partials }: { bytes: number; dtype: Dtype; partials: Pointer }): number {
    const x = blocksOf(bytes / 16)
    this.#launch(CUDA_KERNELS.scan(dtype), { x }, [pointer, BigInt(bytes), partials])
    return x
  }

  #launch(name: string, grid: { x: number; y?: number }, parameters: readonly (bigint | number)[]): void {
    const kernel = this.#kernels.get(name) ?? this.#find(name)
    this.#kernels.set(name, kernel)
    this.#stream.launch(kernel, { ...grid, threads: THREADS }, parameters)
  }

  /** Scratch for one matrix before and after its orthogonalization. */
  #matrices(rows: number, cols: number): { x: Pointer; o: Pointer; rows: number; cols: number } {
    const bytes = rows * cols * bytesPerElement('float16')
    return { x: this.#reserve('x', bytes), o: this.#reserve('o', bytes), rows, cols }
  }

  /** Where the device finds a range: in place, or in scratch memory that it is copied to or from. */
  #resident(name: 'gradient' | 'update', range: HostRange): Pointer {
    return range.block.resident ? addressOf(range) : this.#reserve(name, range.bytes)
  }

  #reserve(name: ScratchName, bytes: number): Pointer {
    const known = this.#scratch.get(name)
    if (known && known.bytes >= bytes) return known.pointer
    if (known) {
      this.#stream.synchronize()
      this.#scratch.delete(name)
      this.#cuda.free(known.pointer)
    }
    const pointer = this.#cuda.allocate(bytes)
    this.#scratch.set(name, { pointer, bytes })
    return pointer
  }
}

/** Tasks of one shape, kernel and factor that follow each other are one group. */
function grouped({ plan }: Job): Group[] {
  const groups: Group[] = []
  for (const task of plan.tasks) {
    const factor = task.output_scale ?? plan.scalars.output_scale ?? 1
    const group = { ...asMatrix(task), spec: task.kernel ?? plan.kernel, offset: task.offset, count: 1, factor }
    const last = groups.at(-1)
    if (last && follows(last, group)) last.count += 1
    else groups.push(group)
  }
  return groups
}

// A task's kernel says no more than its shape does: which way to multiply.
function follows(last: Group, { rows, cols, offset, factor }: Group): boolean {
  const same = last.rows === rows && last.cols === cols && last.factor === factor
  return same && offset === last.offset + last.count * rows * cols
}

function asMatrix({ dims }: Task): { rows: number; cols: number } {
  const [rows, cols = 1] = dims
  return { rows, cols }
}

/** Elements that a thread takes at once: every matrix has to start and end on a multiple of them. */
function packOf({ rows, cols, offset, spec }: Group): number {
  return spec.kind === 'muon' && (rows * cols) % VECTOR === 0 && offset % VECTOR === 0 ? VECTOR : 1
}

function blocksFor(group: Group): number {
  return blocksOf((group.rows * group.cols) / packOf(group))
}

function blocksOf(packs: number): number {
  return Math.max(1, Math.min(MAX_BLOCKS, Math.ceil(packs / (THREADS * PACKS_PER_THREAD))))
}

function scalarOf({ plan, gradient_scale }: Job, name: string): number {
  const value = name === 'gradient_scale' ? gradient_scale : plan.scalars[name]
  if (value === undefined) throw new Error(`the plan gives no ${name}`)
  return value
}
/* c8 ignore stop */
