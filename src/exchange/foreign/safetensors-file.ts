import type { FileHandle } from 'node:fs/promises'
import { errorText } from '../../errors.js'
import { readHeader } from '../../store/safetensors.js'
import { type FileTensor, ForeignError } from './file-tensor.js'

const DTYPES = { F32: 'float32', BF16: 'bfloat16', F16: 'float16', I64: 'int64', I32: 'int32' } as const

export type SafetensorsFile = { tensors: Map<string, FileTensor>; metadata: Record<string, string> }

/** The tensors of a safetensors file, where they lie, and what it says of them. Throws ForeignError. */
export async function readSafetensorsFile(file: FileHandle, path: string): Promise<SafetensorsFile> {
  try {
    const { ranges, metadata } = await readHeader(file)
    const tensors = ranges.map(({ name, dtype, shape, begin }): [string, FileTensor] => {
      const strides = shape.map((_, i) => shape.slice(i + 1).reduce((product, size) => product * size, 1))
      return [name, { file, dtype: DTYPES[dtype], at: begin, shape, strides }]
    })
    return { tensors: new Map(tensors), metadata }
  } catch (error) {
    throw new ForeignError(`${path}: ${errorText(error)}`)
  }
}
