import type { FileHandle } from 'node:fs/promises'
import { errorText } from '../../errors.js'
import { rowStrides } from '../array-layout.js'
import { readZip } from '../zip-reader.js'
import { type FileTensor, ForeignError, tensorBytes } from './file-tensor.js'

const MAGIC = '\x93NUMPY'
const MOST_HEADER_BYTES = 65_536
const DTYPES: Readonly<Record<string, string>> = {
  '<f4': 'float32',
  '<f2': 'float16',
  '<f8': 'float64',
  '<i4': 'int32',
  '<i8': 'int64',
}

/** The arrays of a file that numpy.savez wrote, by name. Throws ForeignError. */
export async function readNumpyFile(file: FileHandle, path: string): Promise<Map<string, FileTensor>> {
  try {
    const arrays = new Map<string, FileTensor>()
    for (const [name, { at, bytes }] of await readZip(file)) {
      arrays.set(name.replace(/\.npy$/, ''), await readArray(file, { name, at, bytes }))
    }
    return arrays
  } catch (error) {
    throw new ForeignError(`${path}: ${errorText(error)}`)
  }
}

/** Reads an array's header, of numpy.save's format, versions 1 to 3: a Python dict as text, before the bytes. */
async function readArray(
  file: FileHandle,
  { name, at, bytes }: { name: string; at: number; bytes: number },
): Promise<FileTensor> {
  const { buffer } = await file.read(Buffer.alloc(12), 0, 12, at)
  const version = buffer[6]
  if (buffer.toString('latin1', 0, 6) !== MAGIC || version < 1 || version > 3)
    throw new ForeignError(`entry '${name}' is no array of numpy`)
  const [start, length] = version === 1 ? [10, buffer.readUInt16LE(8)] : [12, buffer.readUInt32LE(8)]
  if (length > Math.min(MOST_HEADER_BYTES, bytes))
    throw new ForeignError(`entry '${name}' has a header of ${length} bytes`)
  const { buffer: text } = await file.read(Buffer.alloc(length), 0, length, at + start)
  const { descr, columns, shape } = parseHeader(text.toString(), name)
  const dtype = DTYPES[descr]
  if (dtype === undefined)
    throw new ForeignError(`entry '${name}' is ${descr}, expected one of ${Object.keys(DTYPES).join(', ')}`)
  const tensor = {
    ...{ file, dtype, at: at + start + length, shape },
    strides: columns ? columnStrides(shape) : rowStrides(shape),
  }
  const [has, expected] = [bytes - start - length, tensorBytes(tensor, `entry '${name}'`)]
  if (has !== expected) throw new ForeignError(`entry '${name}' has ${has} bytes of numbers, expected ${expected}`)
  return tensor
}

function parseHeader(text: string, name: string): { descr: string; columns: boolean; shape: number[] } {
  const [, descr] = /'descr': *'([^']+)'/.exec(text) ?? []
  const [, order] = /'fortran_order': *(True|False)/.exec(text) ?? []
  const [, sizes] = /'shape': *\(([\d, ]*)\)/.exec(text) ?? []
  if (descr === undefined || order === undefined || sizes === undefined)
    throw new ForeignError(`entry '${name}' has the header ${JSON.stringify(text.slice(0, 120))}`)
  const shape = sizes.split(',').filter((size) => size.trim() !== '')
  return { descr, columns: order === 'True', shape: shape.map(Number) }
}

/** The strides, in elements, of an array in Fortran order: its first dimension lies densely. */
function columnStrides(shape: readonly number[]): number[] {
  return shape.map((_, i) => shape.slice(0, i).reduce((product, size) => product * size, 1))
}
