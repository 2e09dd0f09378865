import { FINGERPRINT } from '../fingerprint.js'
import { elementwiseEntryPoints, muonEntryPoints, normuonEntryPoints } from './entry-points.js'

/**
 * Threads of a block, and the most blocks for one matrix or tensor. They are the same on every card, so that partial
 * sums, and with them all bits of a result, do not depend on it.
 */
export const THREADS = 256
export const MAX_BLOCKS = 512
/** Bytes of `struct Partial` (common.cu) and `struct Result` (collect.cu). */
export const PARTIAL_BYTES = 32
export const RESULT_BYTES = 40

/**
 * NVRTC's options for `cudaSource` and a compute capability such as `9.0`. Without contraction to fused multiply-adds a
 * replay's 1·B + 0·G is B, and results are those of the ONNX form.
 */
export const CUDA_OPTIONS = (computeCapability: string) => [
  `--gpu-architecture=sm_${computeCapability.replace('.', '')}`,
  '--std=c++17',
  '--fmad=false',
]

/** The text of a file in kernels/cuda. */
type Read = (name: `${string}.cu`) => string

/**
 * The elementwise parts of every algorithm in CUDA C++, which includes no header. It is compiled for the card at
 * start-up.
 *
 * Muon's matrix products are no part of it: they read the float16 matrix that `normalize` writes, and `finish` or
 * `even` reads their result. On Hopper they are those of gemm.cu, on other cards, and for sides that are no multiple of
 * 8, those of ONNX Runtime.
 */
export function cudaSource(read: Read): string {
  return joined([
    read('common.cu'),
    read('list.cu'),
    fingerprint(),
    read('scan.cu'),
    read('muon.cu'),
    read('collect.cu'),
    `\n${muonEntryPoints()}`,
    read('normuon.cu'),
    normuonEntryPoints(),
    read('elementwise.cu'),
    elementwiseEntryPoints(),
  ])
}

/** The matrix products for Hopper in CUDA C++ (gemm.ts). */
export function gemmSource(read: Read): string {
  return joined([read('gemm.cu')])
}

function joined(parts: readonly string[]): string {
  return parts.map((part) => `\n${part}`).join('')
}

function fingerprint(): string {
  const { step, first, second, shifts } = FINGERPRINT
  const hex = (value: bigint) => `0x${value.toString(16)}ull`
  return `// Fingerprint of docs/protocol.md.
__device__ inline u64 mix(u64 x) {
  x ^= x >> ${shifts[0]};
  x *= ${hex(first)};
  x ^= x >> ${shifts[1]};
  x *= ${hex(second)};
  return x ^ (x >> ${shifts[2]});
}
__device__ inline u64 print_of(u64 word, u64 index) { return mix(word + (index + 1) * ${hex(step)}); }
`
}
