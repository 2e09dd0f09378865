/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { fitsGemm } from '../../kernels/cuda/gemm-plan.js'
import { CUDA_KERNELS, MAX_BLOCKS, THREADS, VECTOR } from '../../kernels/cuda/source.js'
import { bytesPerElement, type Dtype } from '../../kernels/dtype.js'
import { KERNEL_IO, type KernelSpec } from '../../kernels/kernel.js'
import type { Task } from '../optimizer/plan.js'
import { type Cuda, openCuda, type Stream } from './cuda.js'
import { Hopper } from './hopper.js'
import { addressOf, type Executor, type Job, type JobResult, type Need, scalarOf } from './job.js'
import { type Pointer, viewMemory } from './onnxruntime.js'
import { Orthogonalizer } from './orthogonalizer.js'
import { aligned } from './staging.js'

/**
 * `cubin` is the machine code of CUDA_SOURCE for this GPU, `hopper` that of GEMM_SOURCE where it can run, `folder` that of
 * libonnxruntime and its CUDA provider.
 */
export type CudaLane = { kind: 'cuda'; folder: string; gpu: number; cubin: Uint8Array; hopper?: Uint8Array }

type MuonSpec = Extract<KernelSpec, { kind: 'muon' }>

/** Matrices of one shape that lie one behind the other; the whole tensor where the algorithm is elementwise. */
type Group<Spec = KernelSpec> = {
  spec: Spec
  rows: number
  cols: number
  offset: number
  count: number
  factor: number
  /** Where its first matrix's partial sums lie. */
  partials: Pointer
}

/** One job with its device memory. */
type Work = {
  job: Job
  groups: Group[]
  gradient: Pointer
  update: Pointer
  /** Partial sums of the scans of gradient and update, and of what must be finite. */
  scans: Pointer
  checks: Pointer
  checkBlocks: number
  result: number
}

/** One matrix on its way through Newton-Schulz. */
type Matrix = { work: Work; group: Group<MuonSpec>; index: number }

type ScratchName = 'gradients' | 'updates' | 'x' | 'o' | 'partials'

// The layout of Partial and Result in CUDA_SOURCE.
const PARTIAL_BYTES = 32
const RESULT_BYTES = 40
const MOST_RESULTS = 64
const PACKS_PER_THREAD = 4
const ALIGNMENT = 256
// What goes through Newton-Schulz together: as much as fills the chip, because every matrix has memory of its own meanwhile.
// About 0.3 ms of copying.
const BATCH_BYTES = 16 << 20
const TOGETHER_ELEMENTS = 64 << 20
const TOGETHER = 32
// Those of struct Momentum in CUDA_SOURCE; struct Adamw has adamw's.
const MOMENTUM_SCALARS = KERNEL_IO.sgd.scalars

/**
 * Computes jobs on a GPU: gradients and updates in page-locked host memory, state in device memory. The elementwise parts
 * are kernels of our own. The matrix products are our own too on Hopper, where lists of matrices go through them together;
 * ONNX Runtime has them on other cards and for sides that are no multiple of 8. All of it is queued on one stream, and a
 * list of jobs waits for it once. Which way a matrix goes depends on its shape alone.
 */
export class CudaExecutor implements Executor {
  readonly #cuda: Cuda
  readonly #stream: Stream
  /** Copies to and from the host have streams of their own: they go on while the products of other jobs are computed. */
  readonly #copyIn: Stream
  readonly #copyOut: Stream
  readonly #find: (name: string) => Pointer
  readonly #kernels = new Map<string, Pointer>()
  readonly #orthogonalizer: Orthogonalizer
  readonly #hopper: Hopper | undefined
  readonly #results: { pointer: Pointer; view: DataView }
  /** Device memory that grows to what the largest list of jobs needs. */
  readonly #scratch = new Map<ScratchName, { pointer: Pointer; bytes: number }>()

  constructor({ folder, gpu, cubin, hopper }: CudaLane) {
    this.#cuda = openCuda(gpu)
    this.#stream = this.#cuda.createStream()
    this.#copyIn = this.#cuda.createStream()
    this.#copyOut = this.#cuda.createStream()
    this.#find = this.#cuda.load(cubin)
    this.#orthogonalizer = new Orthogonalizer(folder, gpu, this.#stream)
    this.#hopper = hopper && new Hopper(this.#cuda, this.#stream, hopper)
    const pointer = this.#cuda.allocateHost(RESULT_BYTES * MOST_RESULTS)
    this.#results = { pointer, view: new DataView(viewMemory(pointer, RESULT_BYTES * MOST_RESULTS).buffer) }
  }

  /** Runs every Newton-Schulz once: the first run of a size allocates, and cuBLAS chooses its kernels. */
  load(needs: readonly Need[]): void {
    for (const { kernel, dims } of needs) {
      if (kernel.kind !== 'muon') continue
      const [rows, cols] = dims
      const { coefficients } = kernel
      if (this.#takesHopper(rows, cols)) this.#hopper?.run([{ rows, cols, coefficients }])
      else this.#orthogonalizer.run(coefficients, this.#matrices(rows, cols))
    }
    this.#stream.synchronize()
  }

  run(jobs: readonly Job[]): JobResult[] {
    const started = performance.now()
    try {
      const batches = batchesOf(this.#lay(jobs))
      this.#receive(batches[0])
      for (const [index, batch] of batches.entries()) {
        this.#stream.follow(this.#copyIn)
        this.#receive(batches[index + 1] ?? [])
        for (const work of batch) this.#begin(work)
        this.#orthogonalize(batch)
        for (const work of batch) this.#end(work)
      }
    } finally {
      // Also after a failure: what was queued still writes into memory that the runs are about to give away.
      for (const stream of [this.#copyIn, this.#stream, this.#copyOut]) stream.synchronize()
    }
    const computeSeconds = (performance.now() - started) / 1000 / jobs.length
    return jobs.map((job, index) => ({ ...this.#judge(job, index), computeSeconds }))
  }

  forget(): void {}

  close(): void {
    this.#stream.synchronize()
    this.#orthogonalizer.close()
    this.#hopper?.close()
    for (const { pointer } of this.#scratch.values()) this.#cuda.free(pointer)
    this.#cuda.freeHost(this.#results.pointer)
    for (const stream of [this.#copyIn, this.#stream, this.#copyOut]) stream.destroy()
  }

  /** Gives every job its places in scratch memory. */
  #lay(jobs: readonly Job[]): Work[] {
    if (jobs.length > MOST_RESULTS) throw new Error(`${jobs.length} jobs at once, at most ${MOST_RESULTS}`)
    const plans = jobs.map((job) => {
      const groups = grouped(job)
      return { job, groups, checkBlocks: groups.reduce((sum, group) => sum + group.count * blocksFor(group), 0) }
    })
    const bytesOf = (name: 'gradient' | 'update') =>
      jobs.reduce((sum, job) => sum + (job[name].block.resident ? 0 : aligned(job[name].bytes, ALIGNMENT)), 0)
    let gradients = this.#reserve('gradients', bytesOf('gradient'))
    let updates = this.#reserve('updates', bytesOf('update'))
    const partials = plans.reduce((sum, { checkBlocks }) => sum + (2 * MAX_BLOCKS + checkBlocks) * PARTIAL_BYTES, 0)
    let at = this.#reserve('partials', partials)
    return plans.map(({ job, groups, checkBlocks }, result) => {
      const gradient = job.gradient.block.resident ? addressOf(job.gradient) : gradients
      const update = job.update.block.resident ? addressOf(job.update) : updates
      if (gradient === gradients) gradients += BigInt(aligned(job.gradient.bytes, ALIGNMENT))
      if (update === updates) updates += BigInt(aligned(job.update.bytes, ALIGNMENT))
      const [scans, checks] = [at, at + BigInt(2 * MAX_BLOCKS * PARTIAL_BYTES)]
      at = checks
      for (const group of groups) {
        group.partials = at
        at += BigInt(group.count * blocksFor(group) * PARTIAL_BYTES)
      }
      return { job, groups, gradient, update, scans, checks, checkBlocks, result }
    })
  }

  /** The gradients' way to the device. */
  #receive(batch: readonly Work[]): void {
    for (const { job, gradient } of batch) {
      if (!job.gradient.block.resident) this.#copyIn.copy(gradient, addressOf(job.gradient), job.gradient.bytes)
    }
  }

  /** Everything before Newton-Schulz. */
  #begin(work: Work): void {
    const { job, gradient, scans } = work
    const { gradient_dtype } = job.plan.kernel
    this.#scan(gradient, { bytes: job.gradient.bytes, dtype: gradient_dtype, partials: scans })
    for (const group of work.groups) {
      if (isMuon(group)) this.#momentum(work, group)
      else this.#elementwise(work, group)
    }
  }

  /** What the update says, and its way back. */
  #end({ job, update, scans, checks, checkBlocks, result }: Work): void {
    const updateScans = scans + BigInt(MAX_BLOCKS * PARTIAL_BYTES)
    const { bytes } = job.update
    this.#scan(update, { bytes, dtype: job.plan.kernel.update_dtype, partials: updateScans })
    this.#launch(CUDA_KERNELS.collect(), { x: 1 }, [
      ...[scans, BigInt(scanBlocks(job.gradient.bytes)), BigInt(job.gradient.bytes)],
      ...[updateScans, BigInt(scanBlocks(bytes)), BigInt(bytes)],
      ...[checks, BigInt(checkBlocks), this.#results.pointer + BigInt(result * RESULT_BYTES)],
    ])
    if (job.update.block.resident) return
    this.#copyOut.follow(this.#stream)
    this.#copyOut.copy(addressOf(job.update), update, bytes)
  }

  #judge({ expected }: Job, index: number): Omit<JobResult, 'computeSeconds'> {
    const { view } = this.#results
    const at = index * RESULT_BYTES
    const result = {
      gradientFingerprint: view.getBigUint64(at, true),
      updateFingerprint: view.getBigUint64(at + 8, true),
      gradientSquare: view.getFloat64(at + 16, true),
      updateSquare: view.getFloat64(at + 24, true),
    }
    if (expected !== undefined && expected !== result.gradientFingerprint)
      return { ...result, outcome: 'other_gradient' }
    const finite = [result.gradientSquare, result.updateSquare, view.getFloat64(at + 32, true)].every(Number.isFinite)
    return { ...result, outcome: finite ? 'computed' : 'not_finite' }
  }

  #elementwise({ job, gradient, update }: Work, group: Group): void {
    const { kind, gradient_dtype, update_dtype } = group.spec
    const kernels = { adamw: CUDA_KERNELS.adamw, sgd: CUDA_KERNELS.sgd, muon: CUDA_KERNELS.sgd }
    const state = job.next.map((_, i) => job.state?.[i] ?? 0n)
    this.#launch(kernels[kind](gradient_dtype, update_dtype), { x: blocksFor(group) }, [
      ...[gradient, ...state, ...job.next, update, BigInt(group.rows * group.cols)],
      ...[...KERNEL_IO[kind].scalars.map((name) => scalarOf(job, name)), group.partials],
    ])
  }

  #momentum({ job, gradient }: Work, group: Group<MuonSpec>): void {
    const { gradient_dtype } = group.spec
    const first = { group, index: 0 }
    const buffer = job.state?.[0] ?? 0n
    this.#launch(CUDA_KERNELS.momentum(gradient_dtype, packOf(group) > 1), { x: blocksFor(group), y: group.count }, [
      ...[at(first, gradient, gradient_dtype), buffer && at(first, buffer, 'float32')],
      ...[at(first, job.next[0], 'float32'), packsOf(group)],
      ...[...MOMENTUM_SCALARS.map((name) => scalarOf(job, name)), group.partials],
    ])
  }

  #orthogonalize(works: readonly Work[]): void {
    const matrices = works.flatMap((work) => work.groups.filter(isMuon).flatMap((group) => matricesOf(work, group)))
    const alone = matrices.filter(({ group }) => !this.#takesHopper(group.rows, group.cols))
    for (const matrix of alone) this.#orthogonalizeAlone(matrix)
    const together = matrices.filter((matrix) => !alone.includes(matrix))
    for (const list of lists(together)) this.#orthogonalizeTogether(list)
  }

  #takesHopper(rows: number, cols: number): boolean {
    return this.#hopper !== undefined && fitsGemm(rows, cols)
  }

  #orthogonalizeAlone(matrix: Matrix): void {
    const { rows, cols, spec } = matrix.group
    const memory = this.#matrices(rows, cols)
    const { input_scale, output_scale } = this.#orthogonalizer.scales(spec.coefficients, memory)
    this.#normalize(matrix, memory.x, input_scale)
    this.#orthogonalizer.run(spec.coefficients, memory)
    this.#finish(matrix, memory.o, output_scale)
  }

  #orthogonalizeTogether(matrices: readonly Matrix[]): void {
    if (!this.#hopper) return
    const list = matrices.map(({ group }) => ({
      rows: group.rows,
      cols: group.cols,
      coefficients: group.spec.coefficients,
    }))
    const places = this.#hopper.places(list)
    for (const [i, matrix] of matrices.entries()) this.#normalize(matrix, places[i].x, 1)
    this.#hopper.run(list)
    for (const [i, matrix] of matrices.entries()) this.#finish(matrix, places[i].o, 1)
  }

  #normalize(matrix: Matrix, x: Pointer, input_scale: number): void {
    const { work, group, index } = matrix
    const { job, gradient } = work
    const { gradient_dtype } = group.spec
    const blocks = blocksFor(group)
    this.#launch(CUDA_KERNELS.normalize(gradient_dtype, packOf(group) > 1), { x: blocks }, [
      ...[at(matrix, gradient, gradient_dtype), at(matrix, job.next[0], 'float32'), x, packsOf(group)],
      ...[...MOMENTUM_SCALARS.map((name) => scalarOf(job, name)), scalarOf(job, 'eps'), input_scale],
      ...[group.partials + BigInt(index * blocks * PARTIAL_BYTES), BigInt(blocks)],
    ])
  }

  #finish(matrix: Matrix, o: Pointer, output_scale: number): void {
    const { work, group } = matrix
    const { update_dtype } = group.spec
    this.#launch(CUDA_KERNELS.finish(update_dtype, packOf(group) > 1), { x: blocksFor(group) }, [
      ...[o, at(matrix, work.update, update_dtype), packsOf(group), group.factor * output_scale],
    ])
  }

  #scan(pointer: Pointer, { bytes, dtype, partials }: { bytes: number; dtype: Dtype; partials: Pointer }): void {
    this.#launch(CUDA_KERNELS.scan(dtype), { x: scanBlocks(bytes) }, [pointer, BigInt(bytes), partials])
  }

  #launch(name: string, grid: { x: number; y?: number }, parameters: readonly (bigint | number)[]): void {
    const kernel = this.#kernels.get(name) ?? this.#find(name)
    this.#kernels.set(name, kernel)
    this.#stream.launch(kernel, { ...grid, threads: THREADS }, parameters)
  }

  /** Scratch for one matrix before and after its orthogonalization by ONNX Runtime. */
  #matrices(rows: number, cols: number): { x: Pointer; o: Pointer; rows: number; cols: number } {
    const bytes = rows * cols * bytesPerElement('float16')
    return { x: this.#reserve('x', bytes), o: this.#reserve('o', bytes), rows, cols }
  }

  #reserve(name: ScratchName, bytes: number): Pointer {
    const known = this.#scratch.get(name)
    if (known && known.bytes >= bytes) return known.pointer
    if (known) {
      this.#stream.synchronize()
      this.#scratch.delete(name)
      this.#cuda.free(known.pointer)
    }
    const pointer = this.#cuda.allocate(Math.max(bytes, ALIGNMENT))
    this.#scratch.set(name, { pointer, bytes })
    return pointer
  }
}

/** Cuts a list of jobs where enough bytes are together: the copies of one batch overlap with the computation of the others. */
function batchesOf(works: readonly Work[]): Work[][] {
  const batches: Work[][] = []
  let bytes = BATCH_BYTES
  for (const work of works) {
    if (bytes >= BATCH_BYTES) {
      batches.push([])
      bytes = 0
    }
    batches.at(-1)?.push(work)
    bytes += work.job.gradient.bytes
  }
  return batches
}

function isMuon(group: Group): group is Group<MuonSpec> {
  return group.spec.kind === 'muon'
}

function matricesOf(work: Work, group: Group<MuonSpec>): Matrix[] {
  return Array.from({ length: group.count }, (_, index) => ({ work, group, index }))
}

/** Where a matrix lies in a tensor of its parameter. */
function at({ group, index }: Pick<Matrix, 'group' | 'index'>, base: Pointer, dtype: Dtype): Pointer {
  return base + BigInt((group.offset + index * group.rows * group.cols) * bytesPerElement(dtype))
}

/** Cuts matrices into lists that go through Newton-Schulz together, the same shapes side by side: few lists are distinct then. */
function lists(matrices: readonly Matrix[]): Matrix[][] {
  const key = ({ group }: Matrix) => group.rows * 2 ** 20 + group.cols
  const cut: Matrix[][] = []
  let elements = 0
  for (const matrix of [...matrices].sort((a, b) => key(a) - key(b))) {
    const size = matrix.group.rows * matrix.group.cols
    const last = cut.at(-1)
    if (last && last.length < TOGETHER && elements + size <= TOGETHER_ELEMENTS) last.push(matrix)
    else cut.push([matrix])
    elements = (last === cut.at(-1) ? elements : 0) + size
  }
  return cut
}

/** Tasks of one shape, kernel and factor that follow each other are one group. */
function grouped({ plan }: Job): Group[] {
  const groups: Group[] = []
  for (const task of plan.tasks) {
    const factor = task.output_scale ?? plan.scalars.output_scale ?? 1
    const spec = task.kernel ?? plan.kernel
    const group = { ...asMatrix(task), spec, offset: task.offset, count: 1, factor, partials: 0n }
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

function packsOf(group: Group): bigint {
  return BigInt((group.rows * group.cols) / packOf(group))
}

function scanBlocks(bytes: number): number {
  return blocksOf(bytes / 16)
}

function blocksOf(packs: number): number {
  return Math.max(1, Math.min(MAX_BLOCKS, Math.ceil(packs / (THREADS * PACKS_PER_THREAD))))
}
/* c8 ignore stop */
