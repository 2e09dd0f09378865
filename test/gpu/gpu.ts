import { openBackend } from '../../src/device/backend.js'

const onnxruntime_dir = process.env.MUOND_ONNXRUNTIME_DIR ?? ''

export const CUDA = { device: 'cuda', onnxruntime_dir }

/** Why the tests of the GPU are skipped here; empty where there is a usable one. */
export const NO_GPU = reason()

function reason(): string {
  const backend = openBackend({ device: 'auto', onnxruntime_dir, lanes: 0, threads: 0 })
  backend.close()
  /* c8 ignore next -- on a GPU this has no reason */
  return backend.kind === 'cuda' ? '' : backend.note
}
