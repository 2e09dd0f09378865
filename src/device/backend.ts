import { existsSync } from 'node:fs'
import { availableParallelism, cpus, totalmem } from 'node:os'
import { join } from 'node:path'
import { GEMM_OPTIONS } from '../../kernels/cuda/gemm.js'
import { CUDA_OPTIONS } from '../../kernels/cuda/source.js'
import type { Mapping } from '../wire/shared-memory.js'
import {
  type Cuda,
  compileCuda,
  deviceCount,
  driverVersion,
  missingCompiler,
  missingLibraries,
  openCuda,
} from './cuda/cuda.js'
import type { Kernels } from './cuda/scratch.js'
import { CUDA_SOURCE, GEMM_SOURCE } from './cuda/sources.js'
import type { LaneOptions } from './executor.js'
import type { GroupLimit } from './job.js'
import type { Allocator } from './memory.js'
import {
  bundledLibraryFolder,
  copyMemory,
  type OnnxRuntime,
  openOnnxRuntime,
  type Pointer,
} from './onnx/onnxruntime.js'
import type { StateLocation } from './state-access.js'

/** A device before it is started: its units, its memory and how its lanes are to compute. */
export type Backend = {
  kind: 'cpu' | 'cuda'
  /** A name for people, such as `cpu` or `cuda:0 NVIDIA H200`. */
  name: string
  /** The version of ONNX Runtime. */
  version: string
  /** The processor's model where results depend on it in their last bits and `name` does not say it; else empty. */
  processor: string
  /** Why `auto` took no GPU, or why a GPU computes without kernels of our own; else empty. */
  note: string
  /** Lanes of each unit, and the limit of a group of jobs that a lane is given at a time. */
  lanes: number
  group: GroupLimit
  /** Memory that the host and the device share: page-locked where the device asks for it. */
  host: Allocator
  /** What a GPU needs to compute on memory that clients share; left out where lanes copy all of it. */
  sharing?: Sharing
  /** Bytes of host memory for updates; left out where the units' own memory is the host's. */
  hostBytes?: number
  units: readonly Unit[]
  /** Releases ONNX Runtime, which would otherwise be destroyed at the end of the process, when CUDA is gone already. */
  close(): void
}

/** Memory of other processes on this host, as GPUs see it. */
export type Sharing = {
  /** The unit of the GPU with this UUID; undefined where no unit is on it. */
  unitOf(uuid: string): number | undefined
  /** Opens memory of a unit's GPU that another process has exported. */
  open(unit: number, handle: Uint8Array): Mapping
  lock(pointer: Pointer, bytes: number): void
  unlock(pointer: Pointer): void
}

/** One part of a device with memory of its own: a GPU, or the CPU. */
export type Unit = {
  name: string
  lane: LaneOptions
  state: Allocator
  location: StateLocation
  /** Copies bytes of state memory to the host: as many as `target` has. */
  read(pointer: Pointer, target: Uint8Array<ArrayBuffer>): void
  /** The kernels of the unit's lanes; left out where lanes set no memory of the unit aside. */
  kernels?: Kernels
  /** Bytes that runs may have, and how many bytes that were freed may be kept for the next allocation. */
  stateBytes: number
  pooledBytes: number
}

export type BackendOptions = {
  /** auto | cpu | cuda | cuda:0 | cuda:0,1 */
  device: string
  /** The folder of libonnxruntime; empty: the one inside onnxruntime-node. */
  onnxruntime_dir: string
  /** Worker threads that compute, and on the CPU the intra-op threads of each; 0: the device's default. */
  lanes: number
  threads: number
  /** The most jobs that a lane of a GPU is given at once; left out: the number that was measured to be best. */
  group_jobs?: number
}

// The share of the host's memory that runs may have.
const MEMORY_SHARE = 0.75
const CUDA_FILES = ['libonnxruntime_providers_cuda.so', 'libonnxruntime_providers_shared.so']
// Lanes on the CPU share its memory bandwidth and its arena of intermediates: more than four gain nothing.
const MAX_CPU_LANES = 4
// Measured on an H200: four lanes keep it busy and its copies under way, more gain nothing (docs/measurements.md).
const CUDA_LANES = 4
// Device memory of a lane beside state and scratch: cuBLAS workspaces, machine code, lists of tiles.
const CUDA_LANE_BYTES = 256 << 20
// Freeing device memory waits for all work of the device: memory that a step frees is kept for the next step instead.
const CUDA_POOLED_BYTES = 4 * 2 ** 30
// A lane of the CPU computes its jobs one after the other. Small ones go together, because a message to a thread takes
// longer than their work.
const CPU_GROUP: GroupLimit = { jobs: 64, bytes: 512 << 10 }
// Small matrices fill a GPU only together, and the launches of small tensors cost more than their work. Groups of more
// bytes gain nothing, take scratch memory and are copied later.
export const CUDA_GROUP: GroupLimit = { jobs: 64, bytes: 256 << 20 }
const HOPPER = '9.0'
const CUDA_13 = 13000

/** Finds the device that the settings ask for; throws an Error that says what is missing and how to get it. */
export function openBackend(options: BackendOptions): Backend {
  const folder = options.onnxruntime_dir || bundledLibraryFolder()
  const runtime = openOnnxRuntime(folder)
  const { device } = options
  if (device === 'cpu') return cpu(runtime, folder, { ...options, note: '' })
  const problem = cudaProblem(folder, device)
  /* c8 ignore next -- needs a GPU: npm run test:gpu */
  if (problem === undefined) return cuda(runtime, folder, options)
  if (device === 'auto') return cpu(runtime, folder, { ...options, note: problem })
  throw new Error(`device ${device} is not usable: ${problem}`)
}

function cpu(runtime: OnnxRuntime, folder: string, options: BackendOptions & { note: string }): Backend {
  const cores = availableParallelism()
  const lanes = options.lanes || Math.min(cores, MAX_CPU_LANES)
  const threads = options.threads || Math.max(1, Math.floor(cores / lanes))
  const unit: Unit = {
    name: 'cpu',
    lane: { kind: 'cpu', folder, threads },
    state: runtime,
    location: { kind: 'host' },
    read: (pointer, target) => copyMemory(target, pointer, target.length),
    stateBytes: Math.floor(totalmem() * MEMORY_SHARE),
    // Enough that small tensors need no allocation. The state of the largest parameter is kept beside it.
    pooledBytes: 64 << 20,
  }
  const { version } = runtime
  return {
    kind: 'cpu',
    name: 'cpu',
    version,
    processor: [...new Set(cpus().map(({ model }) => model))].join(', '),
    note: options.note,
    lanes,
    group: CPU_GROUP,
    host: runtime,
    units: [unit],
    close: runtime.close,
  }
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
function cuda(runtime: OnnxRuntime, folder: string, options: BackendOptions): Backend {
  const opened = gpusOf(options.device).map((gpu) => ({ gpu, cuda: openCuda(gpu) }))
  const lanes = options.lanes || CUDA_LANES
  const withoutCompiler = missingCompiler()
  const note =
    withoutCompiler === undefined ? '' : `${withoutCompiler}: the kernels are ONNX Runtime's, which are slower`
  // A GPU that is named twice is two units.
  const shares = (gpu: number) => opened.filter((one) => one.gpu === gpu).length
  const units = opened.map(({ gpu, cuda }): Unit => {
    const code = withoutCompiler === undefined ? compiled(cuda.computeCapability) : undefined
    return {
      name: `cuda:${gpu} ${cuda.name}`,
      lane: code ? { kind: 'cuda', folder, gpu, ...code } : { kind: 'cuda_onnx', folder, gpu },
      kernels: code ? (code.hopper ? 'own' : 'own_but_products') : 'onnx',
      state: cuda,
      location: { kind: 'cuda', gpu },
      read: (pointer, target) => cuda.read(target, pointer),
      stateBytes: Math.max(0, Math.floor(cuda.memory().free / shares(gpu)) - lanes * CUDA_LANE_BYTES),
      pooledBytes: CUDA_POOLED_BYTES,
    }
  })
  const [{ cuda: first }] = opened
  const host = { allocate: first.allocateHost, free: first.freeHost }
  const group = { ...CUDA_GROUP, jobs: options.group_jobs ?? CUDA_GROUP.jobs }
  const name = units.map((unit) => unit.name).join(', ')
  const { version, close } = runtime
  const hostBytes = Math.floor(totalmem() * MEMORY_SHARE)
  const sharing = withoutCompiler === undefined ? sharingOf(opened.map(({ cuda }) => cuda)) : undefined
  const rest = { lanes, group, host, hostBytes, units, close, ...(sharing && { sharing }) }
  return { kind: 'cuda', name, version, processor: '', note, ...rest }
}
/* c8 ignore stop */

/* c8 ignore start -- needs a GPU: npm run test:gpu */
function sharingOf(gpus: readonly Cuda[]): Sharing {
  const [first] = gpus
  return {
    unitOf: (uuid) => {
      const unit = gpus.findIndex((gpu) => gpu.uuid() === uuid)
      return unit < 0 ? undefined : unit
    },
    open: (unit, handle) => {
      const { pointer, bytes, close } = gpus[unit].openShared(handle)
      return { pointer, bytes, unmap: close }
    },
    lock: first.lock,
    unlock: first.unlock,
  }
}

const compiledFor = new Map<string, { cubin: Uint8Array; hopper?: Uint8Array }>()

function compiled(computeCapability: string): { cubin: Uint8Array; hopper?: Uint8Array } {
  const known = compiledFor.get(computeCapability)
  if (known) return known
  const cubin = compileCuda(CUDA_SOURCE, CUDA_OPTIONS(computeCapability))
  const made = computeCapability === HOPPER ? { cubin, hopper: compileCuda(GEMM_SOURCE, GEMM_OPTIONS) } : { cubin }
  compiledFor.set(computeCapability, made)
  return made
}
/* c8 ignore stop */

/** The first thing that `device` lacks to be usable, with the way to get it; undefined where it lacks nothing. */
function cudaProblem(folder: string, device: string): string | undefined {
  // npm's library lists the CUDA provider as available and does not carry its files: only the folder tells.
  const absent = CUDA_FILES.filter((name) => !existsSync(join(folder, name)))
  if (absent.length > 0) {
    const where = 'the Python wheel onnxruntime-gpu carries them in onnxruntime/capi'
    return `${folder} lacks ${absent.join(' and ')}: set MUOND_ONNXRUNTIME_DIR to a folder that holds them beside libonnxruntime of the same version (${where})`
  }
  const libraries = missingLibraries()
  /* c8 ignore next -- needs a driver: npm run test:gpu */
  return libraries.length > 0 ? libraries.join('; ') : gpuProblem(device)
}

/* c8 ignore start -- needs a driver: npm run test:gpu */
function gpuProblem(device: string): string | undefined {
  const version = driverVersion()
  if (version < CUDA_13) {
    const has = `${Math.floor(version / 1000)}.${(version % 1000) / 10}`
    return `the NVIDIA driver supports CUDA ${has}, needed is 13.0: install a driver of version 580 or later`
  }
  const count = deviceCount()
  const absent = gpusOf(device).filter((gpu) => gpu >= count)
  if (absent.length === 0) return undefined
  return `there are ${count} GPUs, asked for is number ${absent.join(', ')} (CUDA_VISIBLE_DEVICES may hide some)`
}

function gpusOf(device: string): number[] {
  const [, list = '0'] = device.split(':')
  return list.split(',').map(Number)
}
/* c8 ignore stop */
