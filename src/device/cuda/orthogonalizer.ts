/* c8 ignore start -- needs a GPU: npm run test:gpu */

import { DTYPES } from '../../../kernels/dtype.js'
import type { Triple } from '../../../kernels/orthogonalize/coefficients.js'
import { buildOrthogonalize, formFor, type OrthogonalizeSpec } from '../../../kernels/orthogonalize/orthogonalize.js'
import { Cache } from '../cache.js'
import { type OnnxRuntime, openOnnxRuntime, type Pointer, type Session } from '../onnx/onnxruntime.js'
import type { CudaStream } from './cuda.js'

/** Two float16 matrices in device memory: the orthogonalization of `x` is written into `o`. */
export type Matrices = { x: Pointer; o: Pointer; rows: number; cols: number }

type Program = { session: Session; input_scale: number; output_scale: number }

const HALF = DTYPES.float16
// A step frame may change the coefficients and with them the graph: the least recently used session makes room.
const MAX_PROGRAMS = 16

/** Newton-Schulz by ONNX Runtime's CUDA provider, on one stream of a GPU. */
export class Orthogonalizer {
  readonly #runtime: OnnxRuntime
  readonly #gpu: number
  readonly #stream: CudaStream
  readonly #programs: Cache<Program>

  constructor(folder: string, gpu: number, stream: CudaStream) {
    this.#runtime = openOnnxRuntime(folder)
    this.#gpu = gpu
    this.#stream = stream
    this.#programs = new Cache(MAX_PROGRAMS, ({ session }) => {
      stream.synchronize()
      this.#runtime.releaseSession(session)
    })
  }

  /** X has to be u/‖u‖ times `input_scale`; the result of `run` times `output_scale` is O. */
  scales(coefficients: readonly Triple[], { rows, cols }: Matrices): { input_scale: number; output_scale: number } {
    return this.#program({ coefficients, tall: rows > cols, form: formFor(rows, cols) })
  }

  /** Queues the orthogonalization of one matrix. */
  run(coefficients: readonly Triple[], { x, o, rows, cols }: Matrices): void {
    const { session } = this.#program({ coefficients, tall: rows > cols, form: formFor(rows, cols) })
    const memory = { bytes: rows * cols * HALF.bytes, gpu: this.#gpu }
    const values = [x, o].map((pointer) => this.#runtime.createTensor({ ...memory, pointer }, [rows, cols], HALF.onnx))
    try {
      this.#runtime.run(session, [values[0]], [values[1]])
    } finally {
      for (const value of values) this.#runtime.releaseTensor(value)
    }
  }

  close(): void {
    this.#programs.clear()
    this.#runtime.close()
  }

  #program(spec: OrthogonalizeSpec): Program {
    const key = JSON.stringify([spec.form, spec.tall, spec.coefficients])
    return this.#programs.get(key, () => this.#build(spec))
  }

  #build(spec: OrthogonalizeSpec): Program {
    const { model, ...scales } = buildOrthogonalize(spec)
    const names = { inputs: ['x'], outputs: ['o'] }
    const session = this.#runtime.createSession(model, names, { gpu: this.#gpu, stream: this.#stream.pointer })
    return { session, ...scales }
  }
}
/* c8 ignore stop */
