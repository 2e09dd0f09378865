import type { SafetensorsDtype } from '../../store/safetensors.js'
import { rowStrides } from '../array-layout.js'
import { type Write, ZipWriter } from '../zip-writer.js'
import { call, global, int, type Picklable, persistent, pickle, tuple } from './pickle.js'

/** torch's storage class of each type. */
const STORAGES: Readonly<Record<SafetensorsDtype, string>> = {
  F32: 'FloatStorage',
  BF16: 'BFloat16Storage',
  F16: 'HalfStorage',
  I64: 'LongStorage',
  I32: 'IntStorage',
}

export type TensorShape = { dtype: SafetensorsDtype; shape: readonly number[] }

/** A contiguous tensor as torch.save pickles it: its bytes are the archive's entry `data/<key>`. */
export function tensorNode({ dtype, shape }: TensorShape, key: string): Picklable {
  const elements = shape.reduce((product, size) => product * size, 1)
  const storage = persistent(tuple('storage', global('torch', STORAGES[dtype]), key, 'cpu', int(elements)))
  return call(
    global('torch._utils', '_rebuild_tensor_v2'),
    ...[storage, int(0), sizes(shape), sizes(rowStrides(shape)), false],
    call(global('collections', 'OrderedDict')),
  )
}

/** A shape or strides, as a tuple of integers. */
export function sizes(shape: readonly number[]): Picklable {
  return tuple(...shape.map(int))
}

const ROOT = 'archive'

/** Writes a file for torch.load: first a pickle, then the bytes of its tensors, in any order. */
export class TorchFile {
  readonly #zip: ZipWriter

  private constructor(zip: ZipWriter) {
    this.#zip = zip
  }

  static async begin(write: Write, value: Picklable): Promise<TorchFile> {
    const file = new TorchFile(new ZipWriter(write))
    await file.#text('data.pkl', pickle(value))
    await file.#text('byteorder', Buffer.from('little'))
    return file
  }

  /** Begins the `bytes` bytes of the tensor that the pickle has under `key`. */
  storage(key: string, bytes: number): ReturnType<ZipWriter['begin']> {
    return this.#zip.begin(`${ROOT}/data/${key}`, bytes)
  }

  async end(): Promise<void> {
    await this.#text('version', Buffer.from('3\n'))
    await this.#zip.end()
  }

  #text(name: string, bytes: Buffer): Promise<void> {
    return this.#zip.add(`${ROOT}/${name}`, bytes.length, [bytes])
  }
}
