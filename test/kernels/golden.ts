import { readdirSync, readFileSync } from 'node:fs'
import { parseSafetensors, type StoredTensor } from '../../src/store/safetensors.js'

/** A file of test/golden: its tensors widened to numbers, its options and the distances that were measured with it. */
export type Golden<Options> = {
  name: string
  bfloat16: boolean
  dims: number[]
  options: Record<string, Options>
  get(key: string): Float64Array
  has(key: string): boolean
}

// Compiled tests lie in dist/test/kernels, the fixtures beside the sources: found from the working directory.
const FOLDER = 'test/golden'

/** Every fixture of one algorithm. `Options` is what its maker wrote, see the README there. */
export function readGolden<Options>(algorithm: 'muon' | 'adamw'): Golden<Options>[] {
  return readdirSync(FOLDER)
    .filter((name) => name.startsWith(`${algorithm}_`))
    .map((name) => {
      const { metadata, tensors } = parseSafetensors(readFileSync(`${FOLDER}/${name}`))
      return {
        name,
        bfloat16: metadata.dtype === 'bf16',
        dims: JSON.parse(metadata.shape),
        options: JSON.parse(metadata.options),
        has: (key) => tensors.has(key),
        get: (key) => widen(tensors.get(key)!),
      }
    })
}

function widen(tensor: StoredTensor): Float64Array {
  const bytes = Uint8Array.from(tensor.data).buffer
  if (tensor.dtype === 'F32') return Float64Array.from(new Float32Array(bytes))
  // A bfloat16 is the upper half of a float32.
  const words = Uint32Array.from(new Uint16Array(bytes), (half) => half << 16)
  return Float64Array.from(new Float32Array(words.buffer))
}
