/*
 * gemm.cu has the matrix products of Newton-Schulz for Hopper: D = alpha·AB + beta·C + gamma·E in half precision with float32 sums, many
 * problems of different sizes in one launch. Written after the PTX ISA (wgmma, cp.async.bulk.tensor, mbarrier).
 *
 * A block is one warp that loads, one that goes ahead of it for the tensor maps, and two warpgroups that multiply, 64 x 256
 * elements each. The two blocks of a cluster have the same columns, and each loads half of B for both. The order of the sums
 * over k is that of the memory, whatever else is in the launch. Of a symmetric D only blocks of 64 x 64 on and below the
 * diagonal are kept and mirrored.
 *
 * Addends come through the ring of stages behind the last slice of k, half a tile (128 columns) each; D is written over
 * the last addend and stored from there. A slot is given back when the next tile's first products are under way.
 *
 * This is what the host knows of it. Constants that both have are held together by test/kernels/cuda.test.ts.
 */

/** Blocks of a cluster; each computes 128 x 256 elements, so the two of a cluster take one of these tiles. */
export const GEMM_CLUSTER = 2
export const GEMM_TILE = { rows: 128 * GEMM_CLUSTER, cols: 256, depth: 64 } as const

const BOX = 64

/**
 * What cuTensorMapEncodeTiled is called with for a float16 matrix of rows x cols, row-major, cols a multiple of 8: type
 * float16, dims (cols, rows), one stride of 2·cols bytes, no interleave, 128 byte swizzle, L2 promotion of 128 bytes,
 * zeros out of bounds. The same map serves for loads and stores.
 */
export const GEMM_MAP = { dataType: 6, box: [BOX, BOX], interleave: 0, swizzle: 3, l2Promotion: 2, fill: 0 } as const
export const GEMM_MAP_BYTES = 128

const STAGES = 4
const BLOCK_BYTES = BOX * BOX * 2
const STAGE_BYTES = 6 * BLOCK_BYTES
const MIRROR_AT = STAGES * STAGE_BYTES
const BARRIERS_AT = MIRROR_AT + 4 * BLOCK_BYTES

/**
 * How to launch: `gemm` with as many blocks as there are multiprocessors, rounded down to whole clusters (which the kernel
 * itself asks for), and parameters of 8 bytes: problems, tiles (both of gemm-plan.ts, in device memory) and rounds.
 * The shared memory is dynamic and has to be allowed by cuFuncSetAttribute.
 */
export const GEMM_KERNEL = 'gemm'
export const GEMM_THREADS = 384
// The ring of stages has to start on 1024 bytes.
export const GEMM_SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8 + 1024

/** Of a problem's operands: whether k runs along the rows of both in memory, across both, or across B only. */
export const GEMM_MODES = { along: 0, across: 1, b_across: 2 } as const

export const GEMM_OPTIONS = ['--gpu-architecture=sm_90a', '--std=c++17'] as const
