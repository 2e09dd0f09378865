import { readdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import koffi from 'koffi'

/** An address in this process. It is valid in every thread; 0n is null. */
export type Pointer = bigint

/** A loaded model, with the names of its inputs and outputs in the order in which `run` takes their values. */
export type Session = { handle: Pointer; inputs: NameList; outputs: NameList; runOptions: Pointer | null }

/**
 * Where a session computes: on `threads` cores, or on a GPU, where `run` queues its work on `stream` and does not wait.
 */
export type SessionTarget = { threads: number } | { gpu: number; stream: Pointer }

type NameList = { pointers: BigUint64Array; texts: Buffer[] }

/** The part of ONNX Runtime's C API that lanes use. Failing calls throw OnnxRuntimeError with the library's message. */
export type OnnxRuntime = {
  version: string
  providers(): string[]
  createSession(
    model: Uint8Array,
    names: { inputs: readonly string[]; outputs: readonly string[] },
    target: SessionTarget,
  ): Session
  releaseSession(session: Session): void
  /** Wraps memory of the host or of a GPU as a tensor of the ONNX type `type`. The caller keeps the memory alive. */
  createTensor(
    memory: { pointer: Pointer; bytes: number; gpu?: number },
    dims: readonly number[],
    type: number,
  ): Pointer
  releaseTensor(tensor: Pointer): void
  /** Runs in the calling thread, on the CPU synchronously. Outputs are written into the memory of the given tensors. */
  run(session: Session, inputs: readonly Pointer[], outputs: readonly Pointer[]): void
  /** Allocates host memory, aligned to 64 bytes, not cleared. */
  allocate(bytes: number): Pointer
  free(pointer: Pointer): void
  /** The address of memory that JavaScript owns; it is good as long as the caller holds `memory`. */
  addressOf(memory: Uint8Array): Pointer
  close(): void
}

export class OnnxRuntimeError extends Error {}

// The C API's table is append-only: version 29 of it is right on ONNX Runtime 1.29 and every later one.
const API_VERSION = 29
const MINIMUM_VERSION = [1, 29] as const

// koffi runs native code on a stack of its own, and MLAS needs more than the default: without this it segfaults.
const STACK_BYTES = 8 << 20
koffi.config({ sync_stack_size: STACK_BYTES, async_stack_size: STACK_BYTES })

// OrtDeviceAllocator and OrtMemTypeDefault of onnxruntime_c_api.h.
const DEVICE_ALLOCATOR = 0
const DEFAULT_MEMORY = 0

const STATUS_CALL = 'void *'
const prototype = (name: string, result: string, parameters: string[]) => koffi.proto(name, result, parameters)
const getApiType = prototype('OrtGetApi', 'void *', ['uint32_t'])
const textType = prototype('OrtText', 'const char *', [])

/** Of each function its index in the API's table (offset / 8), its parameters, and whether it returns a status. */
const CALLS = {
  GetErrorMessage: [2, ['void *'], 'const char *'],
  CreateEnv: [3, ['int', 'const char *', '_Out_ void **'], STATUS_CALL],
  CreateSessionFromArray: [8, ['void *', 'void *', 'size_t', 'void *', '_Out_ void **'], STATUS_CALL],
  Run: [9, ['void *', 'void *', 'void *', 'void *', 'size_t', 'void *', 'size_t', 'void *'], STATUS_CALL],
  CreateSessionOptions: [10, ['_Out_ void **'], STATUS_CALL],
  DisableMemPattern: [17, ['void *'], STATUS_CALL],
  SetIntraOpNumThreads: [24, ['void *', 'int'], STATUS_CALL],
  CreateTensorWithDataAsOrtValue: [
    49,
    ['void *', 'void *', 'size_t', 'void *', 'size_t', 'int', '_Out_ void **'],
    STATUS_CALL,
  ],
  CreateRunOptions: [39, ['_Out_ void **'], STATUS_CALL],
  CreateMemoryInfo: [68, ['const char *', 'int', 'int', 'int', '_Out_ void **'], STATUS_CALL],
  CreateCpuMemoryInfo: [69, ['int', 'int', '_Out_ void **'], STATUS_CALL],
  AllocatorAlloc: [75, ['void *', 'size_t', '_Out_ void **'], STATUS_CALL],
  AllocatorFree: [76, ['void *', 'void *'], STATUS_CALL],
  GetAllocatorWithDefaultOptions: [78, ['_Out_ void **'], STATUS_CALL],
  ReleaseEnv: [92, ['void *'], 'void'],
  ReleaseStatus: [93, ['void *'], 'void'],
  ReleaseMemoryInfo: [94, ['void *'], 'void'],
  ReleaseSession: [95, ['void *'], 'void'],
  ReleaseValue: [96, ['void *'], 'void'],
  ReleaseRunOptions: [97, ['void *'], 'void'],
  ReleaseSessionOptions: [100, ['void *'], 'void'],
  GetAvailableProviders: [125, ['_Out_ void **', '_Out_ int *'], STATUS_CALL],
  ReleaseAvailableProviders: [126, ['void *', 'int'], STATUS_CALL],
  AddSessionConfigEntry: [130, ['void *', 'const char *', 'const char *'], STATUS_CALL],
  AddRunConfigEntry: [165, ['void *', 'const char *', 'const char *'], STATUS_CALL],
  SessionOptionsAppendExecutionProvider_CUDA_V2: [204, ['void *', 'void *'], STATUS_CALL],
  CreateCUDAProviderOptions: [205, ['_Out_ void **'], STATUS_CALL],
  UpdateCUDAProviderOptions: [206, ['void *', 'void *', 'void *', 'size_t'], STATUS_CALL],
  ReleaseCUDAProviderOptions: [208, ['void *'], 'void'],
  SetDeterministicCompute: [273, ['void *', 'bool'], STATUS_CALL],
  UpdateCUDAProviderOptionsWithValue: [263, ['void *', 'const char *', 'void *'], STATUS_CALL],
} as const satisfies Record<string, readonly [number, readonly string[], string]>

type CallName = keyof typeof CALLS
const CALL_TYPES = Object.fromEntries(
  Object.entries(CALLS).map(([name, [, parameters, result]]) => [
    name,
    prototype(`Ort${name}`, result, [...parameters]),
  ]),
)

/** The folder of the library that onnxruntime-node ships for this machine. */
export function bundledLibraryFolder(): string {
  const root = dirname(createRequire(import.meta.url).resolve('onnxruntime-node/package.json'))
  return join(root, 'bin', 'napi-v6', process.platform, process.arch)
}

/** Opens libonnxruntime in `folder` and checks that it is at least 1.29. Source: onnxruntime_c_api.h. */
export function openOnnxRuntime(folder: string = bundledLibraryFolder()): OnnxRuntime {
  const { api, version } = loadApi(folder)
  const call = callers(api)
  const out = (name: CallName, ...parameters: unknown[]): Pointer => {
    const cell: [Pointer] = [0n]
    call(name, ...parameters, cell)
    return cell[0]
  }
  const env = out('CreateEnv', 3, 'muond')
  const memoryInfo = out('CreateCpuMemoryInfo', 1, 0)
  const allocator = out('GetAllocatorWithDefaultOptions')
  const gpuMemoryInfos = new Map<number, Pointer>()
  /* c8 ignore start -- needs a GPU: npm run test:gpu */
  const gpuMemoryInfo = (gpu: number): Pointer => {
    const info = gpuMemoryInfos.get(gpu) ?? out('CreateMemoryInfo', 'Cuda', DEVICE_ALLOCATOR, gpu, DEFAULT_MEMORY)
    gpuMemoryInfos.set(gpu, info)
    return info
  }
  /* c8 ignore stop */
  return {
    version,
    providers: () => availableProviders(call),
    createSession: (model, names, target) => {
      /* c8 ignore next -- needs a GPU: npm run test:gpu */
      const options = 'gpu' in target ? cudaOptions(call, out, target) : cpuOptions(call, out, target.threads)
      const handle = out('CreateSessionFromArray', env, model, model.byteLength, options)
      call('ReleaseSessionOptions', options)
      /* c8 ignore next -- needs a GPU: npm run test:gpu */
      const runOptions = 'gpu' in target ? unsynchronized(call, out) : null
      return { handle, inputs: nameList(names.inputs), outputs: nameList(names.outputs), runOptions }
    },
    releaseSession: (session) => {
      call('ReleaseSession', session.handle)
      /* c8 ignore next -- needs a GPU: npm run test:gpu */
      if (session.runOptions) call('ReleaseRunOptions', session.runOptions)
    },
    createTensor: ({ pointer, bytes, gpu }, dims, type) => {
      const shape = BigInt64Array.from(dims, BigInt)
      /* c8 ignore next -- needs a GPU: npm run test:gpu */
      const info = gpu === undefined ? memoryInfo : gpuMemoryInfo(gpu)
      return out('CreateTensorWithDataAsOrtValue', info, pointer, bytes, shape, dims.length, type)
    },
    releaseTensor: (tensor) => call('ReleaseValue', tensor),
    run: ({ handle, inputs, outputs, runOptions }, inputValues, outputValues) => {
      const given = BigUint64Array.from(inputValues)
      const results = BigUint64Array.from(outputValues)
      call('Run', handle, runOptions, inputs.pointers, given, given.length, outputs.pointers, results.length, results)
    },
    allocate: (bytes) => out('AllocatorAlloc', allocator, bytes),
    free: (pointer) => call('AllocatorFree', allocator, pointer),
    addressOf,
    close: () => {
      for (const info of [memoryInfo, ...gpuMemoryInfos.values()]) call('ReleaseMemoryInfo', info)
      call('ReleaseEnv', env)
    },
  }
}

/** The bytes at an address, without a copy: the memory must outlive every use of them. It takes about 30 µs. */
export function viewMemory(pointer: Pointer, bytes: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(koffi.view(pointer, bytes))
}

/** The address of memory that JavaScript owns; it is good as long as the caller holds `memory`. */
export function addressOf(memory: Uint8Array): Pointer {
  return koffi.address(memory)
}

// What the process itself has loaded, where the system has names for all of it.
/* c8 ignore next -- Windows */
const C_LIBRARY = process.platform === 'win32' ? 'ucrtbase.dll' : null
let memcpy: ((target: Pointer | Uint8Array, source: Pointer, bytes: number) => void) | undefined

/**
 * Copies bytes from one address to another, or into memory that JavaScript owns; the ranges must not overlap. It takes
 * 0.1 µs beside the copying itself: for a few bytes less than to view them, as a view is an object of the garbage
 * collector's.
 */
export function copyMemory(target: Pointer | Uint8Array, source: Pointer, bytes: number): void {
  memcpy ??= koffi.load(C_LIBRARY).func('memcpy', 'void', ['void *', 'void *', 'size_t'])
  memcpy(target, source, bytes)
}

// koffi unloads a library whose handle was collected as garbage, and with it the code behind every function pointer.
const loaded: unknown[] = []

function loadApi(folder: string): { api: Pointer; version: string } {
  const library = koffi.load(join(folder, libraryName(folder)))
  loaded.push(library)
  const base: Pointer = library.func('OrtGetApiBase', 'void *', [])()
  const version: string = koffi.decode(koffi.decode(base, 8, 'void *'), textType)()
  checkVersion(version, folder)
  return { api: koffi.decode(koffi.decode(base, 0, 'void *'), getApiType)(API_VERSION), version }
}

/** Throws where the library is too old for the table's version, or of another major version. */
export function checkVersion(version: string, folder: string): void {
  const [major, minor] = version.split('.').map(Number)
  if (major === MINIMUM_VERSION[0] && minor >= MINIMUM_VERSION[1]) return
  throw new OnnxRuntimeError(`ONNX Runtime in ${folder} is ${version}, needed is ${MINIMUM_VERSION.join('.')} or later`)
}

function libraryName(folder: string): string {
  const found = readdirSync(folder).find((name) => /^libonnxruntime\.(so(\.[\d.]+)?|[\d.]*dylib)$/.test(name))
  if (found === undefined) throw new OnnxRuntimeError(`there is no libonnxruntime in ${folder}`)
  return found
}

type Caller = (name: CallName, ...parameters: unknown[]) => void

function callers(api: Pointer): Caller {
  const bind = (name: CallName) => koffi.decode(koffi.decode(api, CALLS[name][0] * 8, 'void *'), CALL_TYPES[name])
  const functions = Object.fromEntries(Object.keys(CALLS).map((name) => [name, bind(name as CallName)]))
  return (name, ...parameters) => {
    const status: Pointer | null = functions[name](...parameters)
    if (!status || CALLS[name][2] !== STATUS_CALL) return
    const message: string = functions.GetErrorMessage(status)
    functions.ReleaseStatus(status)
    throw new OnnxRuntimeError(`${name}: ${message}`)
  }
}

type Out = (name: CallName, ...rest: unknown[]) => Pointer

function cpuOptions(call: Caller, out: Out, threads: number): Pointer {
  const options = out('CreateSessionOptions')
  call('SetIntraOpNumThreads', options, threads)
  // A memory pattern is one block for all intermediates of a shape, beside the arena's blocks for other shapes.
  call('DisableMemPattern', options)
  // Spinning threads of several sessions would take the cores from the lane that has work.
  call('AddSessionConfigEntry', options, 'session.intra_op.allow_spinning', '0')
  return options
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
// A node that falls back to the CPU would hide copies; TF32 would round float32 products to ten bits.
const CUDA_OPTIONS = { arena_extend_strategy: 'kSameAsRequested', use_tf32: '0' }

function cudaOptions(call: Caller, out: Out, { gpu, stream }: { gpu: number; stream: Pointer }): Pointer {
  const options = out('CreateSessionOptions')
  const provider = out('CreateCUDAProviderOptions')
  try {
    const entries = { device_id: String(gpu), ...CUDA_OPTIONS }
    const keys = nameList(Object.keys(entries))
    const values = nameList(Object.values(entries))
    call('UpdateCUDAProviderOptions', provider, keys.pointers, values.pointers, keys.pointers.length)
    call('UpdateCUDAProviderOptionsWithValue', provider, 'user_compute_stream', stream)
    call('SessionOptionsAppendExecutionProvider_CUDA_V2', options, provider)
    call('AddSessionConfigEntry', options, 'session.disable_cpu_ep_fallback', '1')
    // The provider's fast reductions add in the order in which blocks end: a replay would have other bits.
    call('SetDeterministicCompute', options, true)
    return options
  } finally {
    call('ReleaseCUDAProviderOptions', provider)
  }
}

/** Options with which a run on a GPU returns once its work is queued. */
function unsynchronized(call: Caller, out: Out): Pointer {
  const options = out('CreateRunOptions')
  call('AddRunConfigEntry', options, 'disable_synchronize_execution_providers', '1')
  return options
}

/* c8 ignore stop */

function availableProviders(call: Caller): string[] {
  const list: [Pointer] = [0n]
  const count: [number] = [0]
  call('GetAvailableProviders', list, count)
  const names: string[] = koffi.decode(list[0], koffi.array('const char *', count[0]))
  call('ReleaseAvailableProviders', list[0], count[0])
  return names
}

// An array of C strings (`const char *const *`); the strings live as long as the list that holds them.
function nameList(names: readonly string[]): NameList {
  const texts = names.map((name) => Buffer.from(`${name}\0`))
  return { texts, pointers: BigUint64Array.from(texts, (text) => koffi.address(text)) }
}
