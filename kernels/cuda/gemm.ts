/*
 * The host's side of gemm.cu: the matrix products of Newton-Schulz for Hopper. The kernel computes
 *
 *     D = alpha·AB + beta·C + gamma·E + diagonal·I
 *
 * in half precision with float32 sums, for many problems of different sizes in one launch. It is written after the PTX
 * ISA (wgmma, cp.async.bulk.tensor, mbarrier). test/kernels/cuda.test.ts compares the constants of both files.
 *
 * A block has one warp that loads, one that goes ahead of it and acquires the tensor maps, and two warpgroups that
 * multiply 64 x 256 elements each. The two blocks of a cluster have the same columns, and each loads half of B for
 * both. The order of the sums over k is that of the memory, whatever else is in the launch. Of a symmetric D only
 * blocks of 64 x 64 on and below the diagonal are kept and mirrored.
 *
 * Addends come through the ring of stages behind the last slice of k, half a tile (128 columns) each. D is written over
 * the last addend and stored from there. A stage is given back when the next tile's first products are under way.
 */

/** Blocks of a cluster; each computes 128 x 256 elements, so the two of a cluster take one of these tiles. */
export const GEMM_CLUSTER = 2
export const GEMM_TILE = { rows: 128 * GEMM_CLUSTER, cols: 256, depth: 64 } as const

const BOX = 64

/**
 * The arguments of cuTensorMapEncodeTiled for a float16 matrix of rows x cols, row-major, cols a multiple of 8: type
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
 * The kernel is launched with the clusters of its plan, at most as many as there are pairs of multiprocessors; their
 * size is declared in the kernel. Its parameters have 8 bytes each: problems and tiles (gemm-plan.ts; both in device
 * memory), and rounds. Its shared memory is dynamic and has to be allowed by cuFuncSetAttribute.
 */
export const GEMM_KERNEL = 'gemm'
export const GEMM_THREADS = 384
// 1024 more, because the ring of stages has to start on a multiple of that.
export const GEMM_SHARED_BYTES = BARRIERS_AT + 2 * STAGES * 8 + 1024

/** How the operands of a problem lie in memory: k runs along the rows of both, across those of both, or of B only. */
export const GEMM_MODES = { along: 0, across: 1, b_across: 2 } as const

export const GEMM_OPTIONS = ['--gpu-architecture=sm_90a', '--std=c++17'] as const
