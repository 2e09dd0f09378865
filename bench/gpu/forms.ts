import { GEMM_OPTIONS } from '../../kernels/cuda/gemm.js'
import { CUDA_OPTIONS } from '../../kernels/cuda/source.js'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { compileCuda, openCuda } from '../../src/device/cuda/cuda.js'
import { Hopper } from '../../src/device/cuda/hopper.js'
import { LaunchLists } from '../../src/device/cuda/launch-lists.js'
import { workspaceBytes } from '../../src/device/cuda/scratch.js'
import { CUDA_SOURCE, GEMM_SOURCE } from '../../src/device/cuda/sources.js'

/**
 * Times Newton-Schulz in both forms on an H100 or H200, by the ratio of a matrix's sides: what GRAM_ASPECT of
 * kernels/orthogonalize/orthogonalize.ts should be. `node dist/bench/gpu/forms.js`.
 */
const SIDES = [
  { side: 768, count: 32 },
  { side: 2048, count: 11 },
] as const
const ASPECTS = [1, 1.125, 1.25, 1.5, 1.75, 2, 3, 4]
const RUNS = 21
const KELLER_JORDAN = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, 5)

const cuda = openCuda(0)
const [cubin, products] = [
  compileCuda(CUDA_SOURCE, CUDA_OPTIONS(cuda.computeCapability)),
  compileCuda(GEMM_SOURCE, GEMM_OPTIONS),
]
console.log(`${cuda.name}, milliseconds for a list of matrices`)
for (const { side, count } of SIDES)
  for (const aspect of ASPECTS) {
    const shape = { rows: side, cols: side * aspect }
    const [direct, gram] = [time(shape, count, 'direct'), time(shape, count, 'gram')]
    const ratio = `gram/direct ${(gram / direct).toFixed(3)}`
    console.log(`${count} of ${side}x${shape.cols}: direct ${direct.toFixed(3)}, gram ${gram.toFixed(3)}, ${ratio}`)
  }

/** The median time of a list; after the first run every X is the orthogonalized matrix of the run before. */
function time({ rows, cols }: { rows: number; cols: number }, count: number, form: 'direct' | 'gram'): number {
  const stream = cuda.createStream()
  const lists = new LaunchLists(stream, cuda.load(cubin))
  const hopper = new Hopper({ cuda, stream, lists, form }, products)
  const memory = cuda.allocate(count * workspaceBytes(rows, cols))
  hopper.moveTo(memory)
  const program = hopper.prepare(Array.from({ length: count }, () => ({ rows, cols, coefficients: KELLER_JORDAN })))
  const noise = normalizedNoise(rows * cols)
  for (const { x } of program.ends) stream.upload(x, noise)
  const times: number[] = []
  for (let i = 0; i < RUNS; i++) {
    stream.synchronize()
    const started = performance.now()
    hopper.run(program)
    stream.synchronize()
    times.push(performance.now() - started)
  }
  hopper.close()
  stream.destroy()
  cuda.free(memory)
  return times.sort((a, b) => a - b)[(RUNS - 1) / 2]
}

/** Float16 numbers of random sign and fraction whose Frobenius norm is about 1. */
function normalizedNoise(elements: number): Uint8Array {
  const exponent = 15 - Math.ceil(Math.log2(Math.sqrt(elements)))
  const bits = () => (Math.random() < 0.5 ? 0x8000 : 0) | (exponent << 10) | Math.floor(Math.random() * 1024)
  return new Uint8Array(Uint16Array.from({ length: elements }, bits).buffer)
}
