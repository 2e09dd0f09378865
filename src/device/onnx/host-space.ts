import type { TensorSpace } from './onnx-executor.js'
import type { OnnxRuntime } from './onnxruntime.js'

/** Tensors where the host has them, without a copy, for sessions of `threads` threads. */
export function hostSpace(runtime: OnnxRuntime, threads: number): TensorSpace {
  let zeros = new Uint8Array(0)
  return {
    target: { threads },
    receive: ({ pointer }) => pointer,
    updateOf: ({ pointer }) => pointer,
    send: () => {},
    wait: () => {},
    // Sessions only read it, and the system backs memory that nobody has written with one page of zeros.
    zeros: (bytes) => {
      if (zeros.byteLength < bytes) zeros = new Uint8Array(bytes)
      return runtime.addressOf(zeros)
    },
    load: () => {},
    close: () => {},
  }
}
