/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { CUDA_KERNELS } from '../../../kernels/cuda/entry-points.js'
import { MAX_BLOCKS, PARTIAL_BYTES, RESULT_BYTES, THREADS } from '../../../kernels/cuda/source.js'
import { bytesPerElement } from '../../../kernels/dtype.js'
import { kernelIo, MOMENTUM_SCALARS } from '../../../kernels/kernel.js'
import type { Plan } from '../../optimizer/plan.js'
import type { CudaLane, Executor, Scratch } from '../executor.js'
import { type Job, type JobResult, type Need, scalarOf } from '../job.js'
import { type Pointer, viewMemory } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import { type Cuda, type CudaStream, openCuda } from './cuda.js'
import {
  at,
  type CutPlan,
  crossesBus,
  type Ends,
  firstWord,
  type GpuJob,
  isMatrices,
  isOnGpu,
  isReceived,
  type JobMatrix,
  type JobPiece,
  type JobStack,
  matricesOf,
  packsOf,
  sourceOf,
} from './gpu-job.js'
import { Hopper } from './hopper.js'
import { LaunchLists } from './launch-lists.js'
import { Orthogonalizer } from './orthogonalizer.js'
import {
  batchesOf,
  blocksFor,
  checkBlocksOf,
  listsOf,
  type MuonSpec,
  packOf,
  partialBytes,
  piecesOf,
  scannedInPassing,
} from './pieces.js'
import { Scans } from './scans.js'
import { ALIGNMENT, workspaceBytes } from './scratch.js'
import { ScratchMemory } from './scratch-memory.js'
import { isSmall, SMALL_TOGETHER, SmallOrthogonalizer, smallBytes } from './small.js'

const MOST_RESULTS = 64
// The members of `struct Second` (normuon.cu) after output_scale. Those of `struct Momentum` (muon.cu) are
// MOMENTUM_SCALARS, those of the structs in elementwise.cu the scalars of kernelIo.
const SECOND_SCALARS = ['b_v', 'b_g']
// Rows that a block of second_row takes at a time, and columns that one of second_col does.
const LINES_PER_BLOCK = { row: THREADS / 32, col: 32 }

/**
 * Computes jobs on a GPU. Gradients and updates lie in page-locked host memory or on the GPU, state on the GPU. The
 * elementwise parts are kernels of our own, and so is Newton-Schulz of matrices whose shorter side is small. The matrix
 * products of larger ones are kernels of our own on Hopper, and ONNX Runtime's on other cards. Kernels of our own take
 * lists of matrices. Which products a matrix gets depends on its shape alone. All work is queued on streams, and a list
 * of jobs waits for them once. `load` sets the scratch memory aside.
 */
export class CudaExecutor implements Executor {
  readonly #cuda: Cuda
  readonly #stream: CudaStream
  /** Copies have streams of their own, and so go on while the products of other jobs are computed. */
  readonly #copyIn: CudaStream
  readonly #copyOut: CudaStream
  readonly #lists: LaunchLists
  readonly #scans: Scans
  readonly #orthogonalizer: Orthogonalizer
  readonly #hopper: Hopper | undefined
  readonly #small: SmallOrthogonalizer
  readonly #results: { pointer: Pointer; view: DataView }
  readonly #scratch: ScratchMemory
  readonly #plans = new WeakMap<Plan, CutPlan>()
  /** Where the partial sums of one matrix's second momentum lie. */
  readonly #lineSums: Pointer

  constructor({ folder, gpu, cubin, hopper }: CudaLane) {
    this.#cuda = openCuda(gpu)
    this.#stream = this.#cuda.createStream()
    this.#copyIn = this.#cuda.createStream()
    this.#copyOut = this.#cuda.createStream()
    this.#scratch = new ScratchMemory(this.#cuda)
    this.#lineSums = this.#cuda.allocate(MAX_BLOCKS * PARTIAL_BYTES)
    this.#lists = new LaunchLists(this.#stream, this.#cuda.load(cubin))
    this.#small = new SmallOrthogonalizer(this.#cuda, this.#stream, this.#lists)
    this.#orthogonalizer = new Orthogonalizer(folder, gpu, this.#stream)
    this.#hopper = hopper && new Hopper({ cuda: this.#cuda, stream: this.#stream, lists: this.#lists }, hopper)
    const pointer = this.#cuda.allocateHost(RESULT_BYTES * MOST_RESULTS)
    this.#scans = new Scans(this.#lists, pointer)
    this.#results = { pointer, view: new DataView(viewMemory(pointer, RESULT_BYTES * MOST_RESULTS).buffer) }
  }

  /** Runs every Newton-Schulz once: the first run of a size allocates, and cuBLAS chooses its kernels. */
  load(needs: readonly Need[], scratch?: Scratch): void {
    if (scratch) this.#setAside(scratch)
    for (const { kernel, dims } of needs) {
      if (kernel.kind !== 'muon') continue
      const [rows, cols] = dims
      const { coefficients } = kernel
      if (isSmall(rows, cols)) this.#small.prepare(coefficients)
      else if (this.#hopper) this.#hopper.run(this.#hopper.prepare([{ rows, cols, coefficients }]))
      else this.#orthogonalizer.run(coefficients, this.#matrices(rows, cols))
    }
    this.#stream.synchronize()
  }

  run(jobs: readonly Job[]): JobResult[] {
    const started = performance.now()
    try {
      const laid = this.#lay(jobs)
      const pieces = laid.flatMap((gpuJob) => this.#piecesOf(gpuJob))
      // What crosses no bus is not cut: there is nothing to overlap with.
      const batches = laid.some(crossesBus) ? batchesOf(pieces) : [pieces]
      this.#scans.ofGradients(laid)
      this.#receive(batches[0])
      for (const [index, batch] of batches.entries()) {
        this.#stream.follow(this.#copyIn)
        this.#receive(batches[index + 1] ?? [])
        this.#compute(batch)
        this.#send(batch)
        this.#scans.report(batch.filter(({ last }) => last).map(({ gpuJob }) => gpuJob))
      }
    } finally {
      this.#lists.clear()
      // Also after a failure: queued work still writes into memory that the runs are about to give away.
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
    this.#small.close()
    this.#scratch.free()
    this.#cuda.free(this.#lineSums)
    this.#cuda.freeHost(this.#results.pointer)
    for (const stream of [this.#copyIn, this.#stream, this.#copyOut]) stream.destroy()
  }

  // The programs of Hopper hold addresses in the memory that has moved.
  #setAside(scratch: Scratch): void {
    if (!this.#scratch.growTo(scratch, () => this.#stream.synchronize())) return
    this.#hopper?.moveTo(this.#scratch.products)
  }

  /** Gives every job its addresses in scratch memory. */
  #lay(jobs: readonly Job[]): GpuJob[] {
    if (jobs.length > MOST_RESULTS) throw new Error(`${jobs.length} jobs at once, at most ${MOST_RESULTS}`)
    const take = this.#scratch.tensors()
    return jobs.map((job, result) => {
      const { pieces, checkBlocks, inPassing } = this.#cut(job.plan)
      const scans = take('partials', aligned(partialBytes(checkBlocks), ALIGNMENT))
      const place = (name: 'gradient' | 'update', inPlace: boolean) =>
        inPlace ? job[name].pointer : take(`${name}s`, aligned(job[name].bytes, ALIGNMENT))
      const checks = scans + BigInt(2 * MAX_BLOCKS * PARTIAL_BYTES)
      const gradient = place('gradient', !isReceived(job))
      const update = place('update', job.update.space === 'gpu')
      const written = checks + BigInt(checkBlocks * PARTIAL_BYTES)
      return { job, pieces, inPassing, gradient, update, scans, checks, written, checkBlocks, result }
    })
  }

  // Jobs that are declared alike share their plan.
  #cut(plan: Plan): CutPlan {
    const known = this.#plans.get(plan)
    if (known) return known
    const pieces = piecesOf(plan)
    const cut = { pieces, checkBlocks: checkBlocksOf(pieces), inPassing: scannedInPassing(pieces) }
    this.#plans.set(plan, cut)
    return cut
  }

  #piecesOf(gpuJob: GpuJob): JobPiece[] {
    let at = gpuJob.checks
    return gpuJob.pieces.map((piece, index) => {
      const partials = piece.stacks.map((stack) => {
        const start = at
        at += BigInt(stack.count * blocksFor(stack) * PARTIAL_BYTES)
        return start
      })
      return { ...piece, gpuJob, partials, last: index === gpuJob.pieces.length - 1 }
    })
  }

  /** Queues the copies of gradients into memory of the lane. */
  #receive(batch: readonly JobPiece[]): void {
    for (const { gpuJob, offset, elements } of batch) {
      const { job, gradient } = gpuJob
      if (!isReceived(job) || isOnGpu(job)) continue
      const size = bytesPerElement(job.plan.kernel.gradient_dtype)
      const [start, bytes] = [BigInt(offset * size), elements * size]
      this.#copyIn.copy(gradient + start, (job.source ?? job.gradient).pointer + start, bytes)
      if (job.source) this.#copyIn.copy(job.gradient.pointer + start, gradient + start, bytes)
    }
  }

  #compute(batch: readonly JobPiece[]): void {
    const stacks = batch.flatMap(({ gpuJob, stacks, partials }) =>
      stacks.map((stack, i): JobStack => ({ gpuJob, stack, partials: partials[i] })),
    )
    for (const one of stacks) if (!isMatrices(one)) this.#elementwise(one)
    const matrices = stacks.filter(isMatrices)
    for (const one of matrices) this.#momentum(one)
    this.#lists.launch()
    this.#orthogonalize(matrices.flatMap(matricesOf))
  }

  /** Queues the copies of updates to the host. */
  #send(batch: readonly JobPiece[]): void {
    this.#copyOut.follow(this.#stream)
    for (const { gpuJob, offset, elements } of batch) {
      const { job, update } = gpuJob
      if (job.update.space === 'gpu') continue
      const size = bytesPerElement(job.plan.kernel.update_dtype)
      const to = job.update.pointer + BigInt(offset * size)
      this.#copyOut.copy(to, update + BigInt(offset * size), elements * size)
    }
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

  #elementwise({ gpuJob, stack, partials }: JobStack): void {
    const { job, gradient, update } = gpuJob
    const { gradient_dtype, update_dtype } = stack.spec
    const state = job.next.map((_, i) => job.state?.[i] ?? 0n)
    const first = { stack, index: 0 }
    this.#lists.add(CUDA_KERNELS.elementwise(stack.spec), blocksFor(stack), [
      at(first, gradient, gradient_dtype),
      ...[...state, ...job.next].map((pointer) => pointer && at(first, pointer, 'float32')),
      ...[at(first, update, update_dtype), BigInt(stack.rows * stack.cols)],
      ...[...kernelIo(stack.spec).scalars.map((name) => scalarOf(job, name)), partials],
    ])
  }

  #momentum({ gpuJob, stack, partials }: JobStack<MuonSpec>): void {
    const { job, gradient, inPassing } = gpuJob
    const { gradient_dtype, momentum_dtype = 'float32' } = stack.spec
    const first = { stack, index: 0 }
    const buffer = job.state?.[0] ?? 0n
    const blocks = blocksFor(stack)
    // A gradient that the client may change is read once, and from then on its copy.
    const copies = inPassing.gradient && isOnGpu(job) && isReceived(job)
    this.#lists.add(CUDA_KERNELS.momentum(stack.spec, packOf(stack) > 1), blocks * stack.count, [
      at(first, copies ? sourceOf(job).pointer : gradient, gradient_dtype),
      ...[buffer && at(first, buffer, momentum_dtype), at(first, job.next[0], momentum_dtype)],
      ...[packsOf(stack), BigInt(blocks), inPassing.gradient ? 1n : 0n, firstWord(first, gradient_dtype)],
      copies ? at(first, gradient, gradient_dtype) : 0n,
      ...[...MOMENTUM_SCALARS.map((name) => scalarOf(job, name)), partials],
    ])
  }

  #orthogonalize(matrices: readonly JobMatrix[]): void {
    const small = matrices.filter(({ stack }) => isSmall(stack.rows, stack.cols))
    const large = matrices.filter(({ stack }) => !isSmall(stack.rows, stack.cols))
    const { room } = this.#scratch
    const limits = { room, workspaceOf: smallBytes, most: SMALL_TOGETHER }
    for (const list of listsOf(small, limits)) this.#orthogonalizeSmall(list)
    if (this.#hopper === undefined) for (const matrix of large) this.#orthogonalizeAlone(matrix)
    else this.#inLists(large, this.#hopper)
  }

  #inLists(matrices: readonly JobMatrix[], hopper: Hopper): void {
    const costOf = ({ stack: { rows, cols, spec } }: JobMatrix) => {
      return hopper.costOf({ rows, cols, coefficients: spec.coefficients })
    }
    for (const list of listsOf(matrices, { room: this.#scratch.room, workspaceOf: workspaceBytes, costOf }))
      this.#onHopper(list, hopper)
  }

  #orthogonalizeSmall(matrices: readonly JobMatrix[]): void {
    const take = this.#scratch.workspaces()
    const list = matrices.map(({ stack: { rows, cols, spec } }) => {
      return { rows, cols, coefficients: spec.coefficients, memory: take(smallBytes(rows, cols)) }
    })
    this.#between(matrices, this.#small.endsOf(list), () => this.#small.run(list))
  }

  /** Queues what comes before and after the products of matrices, and between them the products. */
  #between(matrices: readonly JobMatrix[], ends: readonly Ends[], products: () => void): void {
    for (const [i, matrix] of matrices.entries()) this.#normalize(matrix, ends[i])
    this.#lists.launch()
    products()
    for (const [i, matrix] of matrices.entries()) this.#finish(matrix, ends[i])
    this.#lists.launch()
  }

  #orthogonalizeAlone(matrix: JobMatrix): void {
    const { rows, cols, spec } = matrix.stack
    const memory = this.#matrices(rows, cols)
    const scales = this.#orthogonalizer.scales(spec.coefficients, memory)
    const ends: Ends = { x: memory.x, o: memory.o, product: 'float16', ...scales }
    this.#between([matrix], [ends], () => this.#orthogonalizer.run(spec.coefficients, memory))
  }

  #onHopper(matrices: readonly JobMatrix[], hopper: Hopper): void {
    const list = matrices.map(({ stack }) => ({
      rows: stack.rows,
      cols: stack.cols,
      coefficients: stack.spec.coefficients,
    }))
    const program = hopper.prepare(list)
    this.#between(matrices, program.ends, () => hopper.run(program))
  }

  #normalize(matrix: JobMatrix, { x, product, input_scale }: Ends): void {
    const { gpuJob, stack, index, partials } = matrix
    const { job, gradient } = gpuJob
    const { gradient_dtype, momentum_dtype = 'float32' } = stack.spec
    const blocks = blocksFor(stack)
    this.#lists.add(CUDA_KERNELS.normalize(stack.spec, product, packOf(stack) > 1), blocks, [
      ...[at(matrix, gradient, gradient_dtype), at(matrix, job.next[0], momentum_dtype), x, packsOf(stack)],
      ...[...MOMENTUM_SCALARS.map((name) => scalarOf(job, name)), scalarOf(job, 'eps'), input_scale],
      ...[partials + BigInt(index * blocks * PARTIAL_BYTES), BigInt(blocks)],
    ])
  }

  #finish(matrix: JobMatrix, ends: Ends): void {
    const { gpuJob, stack, index, partials } = matrix
    const { update_dtype, second_momentum } = stack.spec
    if (second_momentum) return this.#even(matrix, ends, second_momentum)
    const { inPassing, checks, written } = gpuJob
    const blocks = blocksFor(stack)
    this.#lists.add(CUDA_KERNELS.finish(update_dtype, ends.product, packOf(stack) > 1), blocks, [
      ...[ends.o, at(matrix, gpuJob.update, update_dtype), packsOf(stack), stack.factor * ends.output_scale],
      ...[inPassing.update ? 1n : 0n, firstWord(matrix, update_dtype)],
      // As the checks of the matrix among the checks of its job.
      written + (partials - checks) + BigInt(index * blocks * PARTIAL_BYTES),
    ])
  }

  /** Queues NorMuon's part for one matrix: the second momentum and the update. */
  #even(matrix: JobMatrix, { o, product, output_scale }: Ends, per: 'row' | 'col'): void {
    const { gpuJob, stack, index } = matrix
    const { rows, cols, spec } = stack
    const { state, next } = gpuJob.job
    const offset = BigInt((stack.lines + index * Math.max(rows, cols)) * bytesPerElement('float32'))
    const blocks = Math.min(MAX_BLOCKS, Math.ceil(Math.max(rows, cols) / LINES_PER_BLOCK[per]))
    // One matrix after the other, because all of them use the same sums.
    this.#lists.add(CUDA_KERNELS.second(per, product), blocks, [
      ...[o, state ? state[1] + offset : 0n, next[1] + offset, BigInt(rows), BigInt(cols), output_scale],
      ...[...SECOND_SCALARS.map((name) => scalarOf(gpuJob.job, name)), this.#lineSums],
    ])
    this.#lists.launch()
    this.#lists.add(CUDA_KERNELS.even(spec.update_dtype, product, packOf(stack) > 1), blocksFor(stack), [
      ...[o, at(matrix, gpuJob.update, spec.update_dtype), packsOf(stack), stack.factor * output_scale],
      ...[next[1] + offset, BigInt(cols), per === 'row' ? 1n : 0n, this.#lineSums, BigInt(blocks)],
    ])
    this.#lists.launch()
  }

  /** The scratch memory of one matrix before and after its orthogonalization by ONNX Runtime. */
  #matrices(rows: number, cols: number): { x: Pointer; o: Pointer; rows: number; cols: number } {
    const bytes = aligned(rows * cols * bytesPerElement('float16'), ALIGNMENT)
    const take = this.#scratch.workspaces()
    return { x: take(bytes), o: take(bytes), rows, cols }
  }
}
/* c8 ignore stop */
