import koffi from 'koffi'
import { LIST_BYTES, mostItems } from '../../../kernels/cuda/entry-points.js'
import { GEMM_MAP, GEMM_MAP_BYTES } from '../../../kernels/cuda/gemm.js'
import type { Pointer } from '../onnx/onnxruntime.js'

/** A failed call of the CUDA driver or of NVRTC, with the name that CUDA gives the error. */
export class CudaError extends Error {}

/** One GPU through the CUDA driver API, in the context that ONNX Runtime uses, too. Failing calls throw CudaError. */
export type Cuda = {
  name: string
  /** The compute capability, such as `9.0`. */
  computeCapability: string
  multiprocessors: number
  memory(): { free: number; total: number }
  allocate(bytes: number): Pointer
  free(pointer: Pointer): void
  /** Allocates page-locked host memory that every GPU may read and write. */
  allocateHost(bytes: number): Pointer
  freeHost(pointer: Pointer): void
  /** The GPU's own name, such as `GPU-5d2a…`, the same in every process. */
  uuid(): string
  /** Opens memory that another process has allocated on this GPU and exported by a handle of 64 bytes. */
  openShared(handle: Uint8Array): { pointer: Pointer; bytes: number; close(): void }
  /** Locks pages of host memory, so that every GPU copies from and to them at full speed, until `unlock`. */
  lock(pointer: Pointer, bytes: number): void
  unlock(pointer: Pointer): void
  /** Copies from device memory, synchronously. */
  read(target: Uint8Array, source: Pointer): void
  createStream(): CudaStream
  /** Lets a kernel be launched with so much dynamic shared memory. */
  allowSharedMemory(kernel: Pointer, bytes: number): void
  /** The tensor map of a matrix, for the copy engine: 128 bytes that have to lie in device memory. */
  encodeTensorMap(matrix: TensorMap): Uint8Array
  /** Loads machine code into this GPU; the function that it returns finds a kernel by its name. */
  load(cubin: Uint8Array): (name: string) => Pointer
}

/** A queue of work on one GPU; the calls return before the work is done. Used by one thread only. */
export type CudaStream = {
  pointer: Pointer
  /** Copies from host to device or back; asynchronously where the host memory is page-locked. */
  copy(to: Pointer, from: Pointer, bytes: number): void
  /** Copies from memory that JavaScript owns, which may change again when this returns. */
  upload(to: Pointer, bytes: Uint8Array): void
  /** Sets bytes of device memory to zero. */
  clear(pointer: Pointer, bytes: number): void
  /** Launches a kernel. Each parameter takes 8 bytes: a bigint is a pointer or a u64, a number is a double. */
  launch(kernel: Pointer, grid: Grid, parameters: readonly (bigint | number)[]): void
  /**
   * Launches a kernel on items that all have equally many parameters. Each block is one of an item's own. At most
   * mostItems go into one launch.
   */
  launchList(kernel: Pointer, threads: number, items: readonly ListItem[]): void
  /** Makes work that is queued later wait for all work that `other` has queued so far; the host does not wait. */
  follow(other: CudaStream): void
  /** Waits until all queued work is done; throws the error of the first that failed. */
  synchronize(): void
  destroy(): void
}

/** `shared` is dynamic shared memory in bytes. */
export type Grid = { x: number; y?: number; threads: number; shared?: number }

/** What a kernel's blocks do together, as many as the item has; parameters are those of `CudaStream.launch`. */
export type ListItem = { blocks: number; parameters: readonly (bigint | number)[] }

/** A float16 matrix in device memory, row-major, `cols` a multiple of 8; GEMM_MAP says how it is cut. */
export type TensorMap = { pointer: Pointer; rows: number; cols: number }

/** Bytes of a handle by which a process exports memory of a GPU (CU_IPC_HANDLE_SIZE). */
export const HANDLE_BYTES = 64
// The driver takes it by value.
koffi.struct('MuondIpcHandle', { bytes: koffi.array('uint8_t', HANDLE_BYTES) })

const DRIVER = {
  cuInit: ['uint'],
  cuDriverGetVersion: ['_Out_ int *'],
  cuDeviceGetCount: ['_Out_ int *'],
  cuDeviceGet: ['_Out_ int *', 'int'],
  cuDeviceGetName: ['void *', 'int', 'int'],
  cuDeviceGetAttribute: ['_Out_ int *', 'int', 'int'],
  cuDevicePrimaryCtxRetain: ['_Out_ void **', 'int'],
  cuCtxSetCurrent: ['void *'],
  cuDeviceGetUuid_v2: ['void *', 'int'],
  cuIpcOpenMemHandle_v2: ['_Out_ void **', 'MuondIpcHandle', 'uint'],
  cuIpcCloseMemHandle: ['void *'],
  cuMemGetAddressRange_v2: ['_Out_ void **', '_Out_ size_t *', 'void *'],
  cuMemHostRegister_v2: ['void *', 'size_t', 'uint'],
  cuMemHostUnregister: ['void *'],
  cuMemGetInfo_v2: ['_Out_ size_t *', '_Out_ size_t *'],
  cuMemAlloc_v2: ['_Out_ void **', 'size_t'],
  cuMemFree_v2: ['void *'],
  cuMemHostAlloc: ['_Out_ void **', 'size_t', 'uint'],
  cuMemFreeHost: ['void *'],
  cuMemcpy: ['void *', 'void *', 'size_t'],
  cuMemcpyAsync: ['void *', 'void *', 'size_t', 'void *'],
  cuMemsetD8Async: ['void *', 'uchar', 'size_t', 'void *'],
  cuStreamCreate: ['_Out_ void **', 'uint'],
  cuStreamDestroy_v2: ['void *'],
  cuStreamSynchronize: ['void *'],
  cuEventCreate: ['_Out_ void **', 'uint'],
  cuEventRecord: ['void *', 'void *'],
  cuEventDestroy_v2: ['void *'],
  cuStreamWaitEvent: ['void *', 'void *', 'uint'],
  cuModuleLoadData: ['_Out_ void **', 'void *'],
  cuModuleGetFunction: ['_Out_ void **', 'void *', 'const char *'],
  cuLaunchKernel: [
    ...['void *', 'uint', 'uint', 'uint', 'uint', 'uint', 'uint', 'uint'],
    ...['void *', 'void *', 'void *'],
  ],
  cuFuncSetAttribute: ['void *', 'int', 'int'],
  cuTensorMapEncodeTiled: [
    ...['void *', 'int', 'uint', 'void *', 'void *', 'void *', 'void *', 'void *'],
    ...['int', 'int', 'int', 'int'],
  ],
  cuGetErrorName: ['int', '_Out_ const char **'],
} as const satisfies Record<string, readonly string[]>

const NVRTC = {
  nvrtcCreateProgram: ['_Out_ void **', 'const char *', 'const char *', 'int', 'void *', 'void *'],
  nvrtcDestroyProgram: ['void *'],
  nvrtcCompileProgram: ['void *', 'int', 'void *'],
  nvrtcGetProgramLogSize: ['void *', '_Out_ size_t *'],
  nvrtcGetProgramLog: ['void *', 'void *'],
  nvrtcGetCUBINSize: ['void *', '_Out_ size_t *'],
  nvrtcGetCUBIN: ['void *', 'void *'],
} as const satisfies Record<string, readonly string[]>

const MULTIPROCESSOR_COUNT = 16
const COMPUTE_CAPABILITY_MAJOR = 75
const COMPUTE_CAPABILITY_MINOR = 76
const MAX_DYNAMIC_SHARED_SIZE = 8
const NON_BLOCKING = 1
const WITHOUT_TIMING = 2
const PORTABLE = 1
const LAZY_PEER_ACCESS = 1
const UUID_BYTES = 16

type Call<Names extends string> = (name: Names, ...parameters: unknown[]) => void
type DriverCall = Call<keyof typeof DRIVER>

// koffi unloads a library whose handle was collected as garbage.
const loaded: unknown[] = []

type Library = readonly [file: string, source: string]

// The libraries that ONNX Runtime's CUDA provider is linked to, and what ships each.
const LIBRARIES: readonly Library[] = [
  ['libcuda.so.1', 'the NVIDIA driver'],
  ['libcudart.so.13', 'CUDA 13, nvidia-cuda-runtime on PyPI'],
  ['libcublas.so.13', 'CUDA 13, nvidia-cublas on PyPI'],
  ['libcublasLt.so.13', 'CUDA 13, nvidia-cublas on PyPI'],
  ['libcurand.so.10', 'CUDA 13, nvidia-curand on PyPI'],
]
const NVRTC_LIBRARY: Library = ['libnvrtc.so.13', 'CUDA 13, nvidia-cuda-nvrtc on PyPI']

/** The libraries that cannot be loaded, each with the reason and what ships it. LD_LIBRARY_PATH names their folders. */
export function missingLibraries(): string[] {
  /* c8 ignore next -- one that is there needs CUDA's libraries: npm run test:gpu */
  return LIBRARIES.flatMap((library) => missing(library) ?? [])
}

/* c8 ignore next 4 -- asked where CUDA's libraries are: npm run test:gpu */
/** Why the compiler for kernels of our own cannot be loaded; undefined where it can. */
export function missingCompiler(): string | undefined {
  return missing(NVRTC_LIBRARY)
}

function missing([file, source]: Library): string | undefined {
  try {
    loaded.push(koffi.load(file))
    /* c8 ignore next -- needs CUDA's libraries: npm run test:gpu */
    return undefined
  } catch (error) {
    return `${file} cannot be loaded (it comes with ${source}): ${error}`
  }
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
/** The version of CUDA that the GPU's driver supports, such as 13000 for 13.0. Throws where there is no driver. */
export function driverVersion(): number {
  return number(openDriver(), 'cuDriverGetVersion')
}

/** The number of GPUs. */
export function deviceCount(): number {
  return number(openDriver(), 'cuDeviceGetCount')
}

/** Opens the GPU with this index. */
export function openCuda(index: number): Cuda {
  const call = openDriver()
  const device = number(call, 'cuDeviceGet', index)
  const context = pointer(call, 'cuDevicePrimaryCtxRetain', device)
  // The current context belongs to the thread, and the event loop's thread serves several GPUs.
  const here: DriverCall = (name, ...parameters) => {
    call('cuCtxSetCurrent', context)
    call(name, ...parameters)
  }
  const attribute = (which: number) => number(call, 'cuDeviceGetAttribute', which, device)
  const computeCapability = `${attribute(COMPUTE_CAPABILITY_MAJOR)}.${attribute(COMPUTE_CAPABILITY_MINOR)}`
  return {
    name: deviceName(call, device),
    computeCapability,
    multiprocessors: attribute(MULTIPROCESSOR_COUNT),
    memory: () => memory(here),
    allocate: (bytes) => pointer(here, 'cuMemAlloc_v2', bytes),
    free: (address) => here('cuMemFree_v2', address),
    allocateHost: (bytes) => {
      const cell: [Pointer] = [0n]
      here('cuMemHostAlloc', cell, bytes, PORTABLE)
      return cell[0]
    },
    freeHost: (address) => here('cuMemFreeHost', address),
    uuid: () => uuid(call, device),
    openShared: (handle) => openShared(here, handle),
    lock: (address, bytes) => here('cuMemHostRegister_v2', address, bytes, PORTABLE),
    unlock: (address) => here('cuMemHostUnregister', address),
    read: (target, source) => here('cuMemcpy', target, source, target.byteLength),
    createStream: () => createStream(here),
    allowSharedMemory: (kernel, bytes) => here('cuFuncSetAttribute', kernel, MAX_DYNAMIC_SHARED_SIZE, bytes),
    encodeTensorMap: (matrix) => encodeTensorMap(here, matrix),
    load: (cubin) => {
      const module = pointer(here, 'cuModuleLoadData', cubin)
      return (name) => pointer(here, 'cuModuleGetFunction', module, name)
    },
  }
}

/** The machine code of CUDA C++ `source`; throws CudaError with the compiler's log. Needs no GPU. */
export function compileCuda(source: string, options: readonly string[]): Uint8Array {
  const call = openNvrtc()
  const program = pointer(call, 'nvrtcCreateProgram', source, 'muond.cu', 0, null, null)
  try {
    const texts = options.map((option) => Buffer.from(`${option}\0`))
    const list = BigUint64Array.from(texts, (text) => koffi.address(text))
    try {
      call('nvrtcCompileProgram', program, options.length, list)
    } catch (error) {
      const log = nvrtcBytes(call, program, 'ProgramLog')
      throw new CudaError(`${error instanceof Error ? error.message : error}: ${Buffer.from(log).toString()}`)
    }
    return nvrtcBytes(call, program, 'CUBIN')
  } finally {
    call('nvrtcDestroyProgram', BigUint64Array.of(program))
  }
}

function createStream(call: DriverCall): CudaStream {
  const stream = pointer(call, 'cuStreamCreate', NON_BLOCKING)
  // A wait keeps the state that the event has at that moment, so one event serves all waits.
  const event = pointer(call, 'cuEventCreate', WITHOUT_TIMING)
  // A launch copies its parameters, so one buffer serves all launches, and the list that points to it never changes.
  const buffer = koffi.alloc('uint8_t', LIST_BYTES)
  const size = koffi.alloc('uint64_t', 1)
  const values = new DataView(koffi.view(buffer, LIST_BYTES))
  const sizes = new DataView(koffi.view(size, 8))
  const extra = BigUint64Array.of(1n, koffi.address(buffer), 2n, koffi.address(size), 0n)
  const put = (start: number, parameters: readonly (bigint | number)[]): number => {
    let at = start
    for (const value of parameters) {
      if (typeof value === 'bigint') values.setBigUint64(at, value, true)
      else values.setFloat64(at, value, true)
      at += 8
    }
    return at
  }
  return {
    pointer: stream,
    copy: (to, from, bytes) => call('cuMemcpyAsync', to, from, bytes, stream),
    upload: (to, bytes) => call('cuMemcpyAsync', to, bytes, bytes.length, stream),
    clear: (address, bytes) => call('cuMemsetD8Async', address, 0, bytes, stream),
    launch: (kernel, { x, y = 1, threads, shared = 0 }, parameters) => {
      sizes.setBigUint64(0, BigInt(put(0, parameters)), true)
      call('cuLaunchKernel', kernel, x, y, 1, threads, 1, 1, shared, stream, null, extra)
    },
    launchList: (kernel, threads, items) => {
      const words = items[0].parameters.length + 2
      let at = put(0, [BigInt(items.length)])
      let first = 0
      for (const { blocks, parameters } of items) {
        at = put(at, parameters)
        at = put(at, [BigInt(first), BigInt(blocks)])
        first += blocks
      }
      // The size is that of the kernel's whole list, however many items it has.
      sizes.setBigUint64(0, BigInt(8 + 8 * words * mostItems(words - 2)), true)
      call('cuLaunchKernel', kernel, first, 1, 1, threads, 1, 1, 0, stream, null, extra)
    },
    follow: (other) => {
      call('cuEventRecord', event, other.pointer)
      call('cuStreamWaitEvent', stream, event, 0)
    },
    synchronize: () => call('cuStreamSynchronize', stream),
    destroy: () => {
      call('cuEventDestroy_v2', event)
      call('cuStreamDestroy_v2', stream)
      koffi.free(buffer)
      koffi.free(size)
    },
  }
}

// cuTensorMapEncodeTiled writes to an address that is a multiple of 64.
const MAP_ALIGNMENT = 64

function encodeTensorMap(call: DriverCall, { pointer: address, rows, cols }: TensorMap): Uint8Array {
  const { dataType, box, interleave, swizzle, l2Promotion, fill } = GEMM_MAP
  const memory = koffi.alloc('uint8_t', GEMM_MAP_BYTES + MAP_ALIGNMENT)
  const start = koffi.address(memory)
  const skip = Number(-start & BigInt(MAP_ALIGNMENT - 1))
  const sizes = [BigUint64Array.of(BigInt(cols), BigInt(rows)), BigUint64Array.of(BigInt(cols * 2))]
  const steps = [Uint32Array.from(box), Uint32Array.of(1, 1)]
  const how = [interleave, swizzle, l2Promotion, fill]
  try {
    call('cuTensorMapEncodeTiled', start + BigInt(skip), dataType, 2, address, ...sizes, ...steps, ...how)
    return new Uint8Array(koffi.view(memory, GEMM_MAP_BYTES + MAP_ALIGNMENT)).slice(skip, skip + GEMM_MAP_BYTES)
  } finally {
    koffi.free(memory)
  }
}

function memory(call: DriverCall): { free: number; total: number } {
  const free: [number] = [0]
  const total: [number] = [0]
  call('cuMemGetInfo_v2', free, total)
  return { free: free[0], total: total[0] }
}

function uuid(call: DriverCall, device: number): string {
  const bytes = Buffer.alloc(UUID_BYTES)
  call('cuDeviceGetUuid_v2', bytes, device)
  return `GPU-${[0, 4, 6, 8, 10].map((start, i, starts) => bytes.toString('hex', start, starts[i + 1])).join('-')}`
}

function openShared(call: DriverCall, handle: Uint8Array): ReturnType<Cuda['openShared']> {
  const opened = pointer(call, 'cuIpcOpenMemHandle_v2', { bytes: handle }, LAZY_PEER_ACCESS)
  const start: [Pointer] = [0n]
  const size: [number] = [0]
  call('cuMemGetAddressRange_v2', start, size, opened)
  return { pointer: opened, bytes: size[0], close: () => call('cuIpcCloseMemHandle', opened) }
}

function deviceName(call: DriverCall, device: number): string {
  const text = Buffer.alloc(256)
  call('cuDeviceGetName', text, text.length, device)
  return text.subarray(0, text.indexOf(0)).toString()
}

let driver: DriverCall | undefined
let nvrtc: Call<keyof typeof NVRTC> | undefined

function openDriver(): DriverCall {
  if (driver) return driver
  const functions = bind('libcuda.so.1', DRIVER)
  const call: DriverCall = (name, ...parameters) => {
    const code = functions[name](...parameters)
    if (code === 0) return
    const text: [string | null] = [null]
    functions.cuGetErrorName(code, text)
    throw new CudaError(`${name}: ${text[0] ?? `error ${code}`}`)
  }
  call('cuInit', 0)
  driver = call
  return call
}

function openNvrtc(): Call<keyof typeof NVRTC> {
  if (nvrtc) return nvrtc
  const functions = bind(NVRTC_LIBRARY[0], NVRTC)
  nvrtc = (name, ...parameters) => {
    const code = functions[name](...parameters)
    if (code !== 0) throw new CudaError(`${name}: error ${code}`)
  }
  return nvrtc
}

function nvrtcBytes(call: Call<keyof typeof NVRTC>, program: Pointer, what: 'ProgramLog' | 'CUBIN'): Uint8Array {
  const size: [number] = [0]
  call(`nvrtcGet${what}Size`, program, size)
  const bytes = new Uint8Array(size[0])
  call(`nvrtcGet${what}`, program, bytes)
  return bytes
}

function bind<Table extends Record<string, readonly string[]>>(file: string, table: Table) {
  const library = koffi.load(file)
  loaded.push(library)
  const entries = Object.entries(table).map(([name, parameters]) => [name, library.func(name, 'int', [...parameters])])
  return Object.fromEntries(entries) as Record<keyof Table, (...parameters: unknown[]) => number>
}

function pointer<Names extends string>(call: Call<Names>, name: Names, ...parameters: unknown[]): Pointer {
  const cell: [Pointer] = [0n]
  call(name, cell, ...parameters)
  return cell[0]
}

function number<Names extends string>(call: Call<Names>, name: Names, ...parameters: unknown[]): number {
  const cell: [number] = [0]
  call(name, cell, ...parameters)
  return cell[0]
}
/* c8 ignore stop */
