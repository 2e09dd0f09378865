import { openCuda } from './cuda/cuda.js'
import { type Pointer, viewMemory } from './onnx/onnxruntime.js'

/** Where a unit's state lies, as plain data, which another thread can be sent. */
export type StateLocation = { kind: 'host' } | { kind: 'cuda'; gpu: number }

/** One thread's access to a unit's state memory. */
export type StateAccess = {
  /** The bytes at an address; they are good until the next call of `read`. */
  read(pointer: Pointer, bytes: number): Uint8Array
  write(pointer: Pointer, source: Uint8Array): void
  /** The bytes at an address without a copy; left out where the host cannot see them. */
  view?(pointer: Pointer, bytes: number): Uint8Array
  close(): void
}

/** Opens this thread's access: addresses are valid in every thread of the process, a GPU's context is not. */
export function openStateAccess(location: StateLocation): StateAccess {
  /* c8 ignore next -- needs a GPU: npm run test:gpu */
  if (location.kind === 'cuda') return gpuAccess(location.gpu)
  return {
    read: viewMemory,
    write: (pointer, source) => viewMemory(pointer, source.length).set(source),
    view: viewMemory,
    close: () => {},
  }
}

/* c8 ignore start -- needs a GPU: npm run test:gpu */
function gpuAccess(gpu: number): StateAccess {
  const cuda = openCuda(gpu)
  const stream = cuda.createStream()
  let staging: { pointer: Pointer; view: Uint8Array<ArrayBuffer> } | undefined
  /** Page-locked memory: copies run at the speed of the bus. */
  const room = (bytes: number) => {
    if (staging === undefined || staging.view.length < bytes) {
      if (staging) cuda.freeHost(staging.pointer)
      const pointer = cuda.allocateHost(bytes)
      staging = { pointer, view: viewMemory(pointer, bytes) }
    }
    return staging
  }
  return {
    read: (pointer, bytes) => {
      const { pointer: target, view } = room(bytes)
      stream.copy(target, pointer, bytes)
      stream.synchronize()
      return view.subarray(0, bytes)
    },
    write: (pointer, source) => {
      const { pointer: from, view } = room(source.length)
      view.set(source)
      stream.copy(pointer, from, source.length)
      stream.synchronize()
    },
    close: () => {
      if (staging) cuda.freeHost(staging.pointer)
      stream.destroy()
    },
  }
}
/* c8 ignore stop */
