import type { FileHandle } from 'node:fs/promises'
import { errorText } from '../../errors.js'
import { readHeader } from '../../store/safetensors.js'
import { DTYPE_NAMES, rowStrides } from '../array-layout.js'
import { type FileTensor, ForeignError } from './file-tensor.js'

export type SafetensorsFile = { tensors: Map<string, FileTensor>; metadata: Record<string, string> }

/** The tensors of a safetensors file by name, and its metadata. Throws ForeignError. */
export async function readSafetensorsFile(file: FileHandle, path: string): Promise<SafetensorsFile> {
  try {
    const { ranges, metadata } = await readHeader(file)
    const tensors = ranges.map(({ name, dtype, shape, begin }): [string, FileTensor] => {
      return [name, { file, dtype: DTYPE_NAMES[dtype], at: begin, shape, strides: rowStrides(shape) }]
    })
    return { tensors: new Map(tensors), metadata }
  } catch (error) {
    throw new ForeignError(`${path}: ${errorText(error)}`)
  }
}
