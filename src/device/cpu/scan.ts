import { bytesPerElement, DTYPES, type Dtype, isDtype } from '../../../kernels/dtype.js'
import { type Scan, scanFunction, WindowScan } from './scan-code.js'
import { assemble, instantiate, PAGE } from './wasm.js'

/** Scans tensors in 128 KiB of memory of its own; a thread needs one. */
export type Scanner = {
  /** Reads `bytes` (little-endian, any alignment) once. Throws RangeError if the last element is incomplete. */
  scan: (bytes: Uint8Array, dtype: Dtype) => Scan
  /** The fingerprint of bytes of any kind. */
  fingerprint: (bytes: Uint8Array) => bigint
}

// The window has the first page of the memory, the record of a scan lies in the second one.
const WINDOW = PAGE
const NAMES = Object.keys(DTYPES).filter(isDtype)
const MODULE = assemble(
  2,
  NAMES.map((dtype) => scanFunction(dtype, dtype, WINDOW)),
)

export function createScanner(): Scanner {
  const { memory, entry } = instantiate(MODULE)
  const scanOf = (dtype: Dtype) => new WindowScan({ memory, call: entry(dtype) }, { dtype, record: WINDOW, window: 0 })
  const scans = { float32: scanOf('float32'), bfloat16: scanOf('bfloat16'), float16: scanOf('float16') }
  const pass = (bytes: Uint8Array, dtype: Dtype): Scan => {
    scans[dtype].reset()
    for (let at = 0; at < bytes.length; at += WINDOW) {
      const window = bytes.subarray(at, at + WINDOW)
      memory.set(window)
      scans[dtype].add(window.length)
    }
    return scans[dtype].result(bytes.length)
  }
  const scan = (bytes: Uint8Array, dtype: Dtype): Scan => {
    if (bytes.length % bytesPerElement(dtype) !== 0) {
      throw new RangeError(`a ${dtype} tensor cannot have ${bytes.length} bytes`)
    }
    return pass(bytes, dtype)
  }
  return { scan, fingerprint: (bytes) => pass(bytes, 'float32').fingerprint }
}
