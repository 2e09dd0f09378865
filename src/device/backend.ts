import { existsSync } from 'node:fs'
import { availableParallelism, totalmem } from 'node:os'
import { join } from 'node:path'
import { CUDA_OPTIONS, CUDA_SOURCE } from '../../kernels/cuda/source.js'
import { compileCuda, deviceCount, driverVersion, missingLibraries, openCuda } from './cuda.js'
import type { LaneOptions } from './lane.js'
import type { Allocator } from './memory.js'
import { bundledLibraryFolder, type OnnxRuntime, openOnnxRuntime, type Pointer, viewMemory } from './onnxruntime.js'

/** What kind of device computes, and where its memory comes from. */
export type Backend = {
  kind: 'cpu' | 'cuda'
  /** Text for people, such as `cpu` or `cuda:0 NVIDIA H200`. */
  name: string
  /** The version of ONNX Runtime. */
  version: string
  /** Why `auto` did not take a GPU; empty where nothing was left aside. */
  note: string
  /** Lanes of each unit. */
  lanes: number
  /** Memory that the host and the device share: page-locked where the device asks for it. */
  host: Allocator
  units: readonly Unit[]
}

/** One part of a device with memory of its own: a GPU, or the CPU. */
export type Unit = {
  name: string
  lane: LaneOptions
  state: Allocator
  /** A copy of state memory. */
  read(pointer: Pointer, bytes: number): Uint8Array<ArrayBuffer>
  /** Bytes that there are for state, and how many of them may be held for nothing but the next allocation. */
  stateBytes: number
  pooledBytes: number
}

export type BackendOptions = { device: string; onnxruntime_dir: string; lanes: number; threads: number }

const CUDA_FILES = ['libonnxruntime_providers_cuda.so', 'libonnxruntime_providers_shared.so']
// Lanes on the CPU share its memory bandwidth and its arena of intermediates: more than four gain nothing.
const MAX_CPU_LANES = 4
// Measured on an H200: with six lanes copies and computation overlap, more gain nothing (README).
const CUDA_LANES = 6
// What a lane holds beside state: cuBLAS workspaces, ONNX Runtime's arenas and scratch for a matrix of 16 M elements.
const CUDA_LANE_BYTES = 1 << 30
// Freeing device memory waits for all of the device's work: what a step frees is kept for the next one.
const CUDA_POOLED_BYTES = 4 * 2 ** 30
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
    read: (pointer, bytes) => viewMemory(pointer, bytes).slice(),
    stateBytes: Math.floor(totalmem() * 0.75),
    // Small tensors cost no allocation this way. A pool must not keep an embedding.
    pooledBytes: 64 << 20,
  }
  const { version } = runtime
  return { kind: 'cpu', name: 'cpu', version, note: options.note, lanes, host: runtime, units: [unit] }
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
function cuda(runtime: OnnxRuntime, folder: string, options: BackendOptions): Backend {
  const opened = gpusOf(options.device).map((gpu) => ({ gpu, cuda: openCuda(gpu) }))
  const lanes = options.lanes || CUDA_LANES
  const cubins = new Map<string, Uint8Array>()
  const units = opened.map(({ gpu, cuda }): Unit => {
    const { computeCapability } = cuda
    const cubin = cubins.get(computeCapability) ?? compileCuda(CUDA_SOURCE, CUDA_OPTIONS(computeCapability))
    cubins.set(computeCapability, cubin)
    return {
      name: `cuda:${gpu} ${cuda.name}`,
      lane: { kind: 'cuda', folder, gpu, cubin },
      state: cuda,
      read: (pointer, bytes) => {
        const copy = new Uint8Array(bytes)
        cuda.read(copy, pointer)
        return copy
      },
      stateBytes: Math.max(0, cuda.memory().free - lanes * CUDA_LANE_BYTES - CUDA_POOLED_BYTES),
      pooledBytes: CUDA_POOLED_BYTES,
    }
  })
  const [{ cuda: first }] = opened
  const host = { allocate: first.allocateHost, free: first.freeHost }
  const name = units.map((unit) => unit.name).join(', ')
  return { kind: 'cuda', name, version: runtime.version, note: '', lanes, host, units }
}
/* c8 ignore stop */

/** The first thing that keeps `device` from being used, with the way to get it; undefined where nothing does. */
function cudaProblem(folder: string, device: string): string | undefined {
  // The library that npm ships names the CUDA provider among its own but does not carry its files: only the folder tells.
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
  return [...new Set(list.split(',').map(Number))]
}
/* c8 ignore stop */
