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

const ACCUMULATORS = 128
const list = (count: number, of: (index: number) => string) => Array.from({ length: count }, (_, i) => of(i)).join(', ')

/**
 * Matrix products of Newton-Schulz for Hopper: D = alpha·AB + beta·C + gamma·E in half precision with float32 sums, many
 * problems of different sizes in one launch. Written after the PTX ISA (wgmma, cp.async.bulk.tensor, mbarrier).
 *
 * A block is one warp that loads, one that goes ahead of it for the tensor maps, and two warpgroups that multiply, 64 x 256
 * elements each. The two blocks of a cluster
 * have the same columns, and each loads half of B for both. The order of the sums over k is that of the memory, whatever
 * else is in the launch. Of a symmetric D only blocks of 64 x 64 on and below the diagonal are kept and mirrored.
 *
 * Addends come through the ring of stages behind the last slice of k, half a tile (128 columns) each; D is written over
 * the last addend and stored from there. A slot is given back when the next tile's first products are under way.
 */
export const GEMM_SOURCE = `
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

const u32 CLUSTER = ${GEMM_CLUSTER}, STAGES = ${STAGES}, BLOCK = ${BLOCK_BYTES}, STAGE = ${STAGE_BYTES};
const u32 CONSUMER_WARPS = 8, NONE = 0xffffffff;
const u32 ALONG = ${GEMM_MODES.along}, ACROSS = ${GEMM_MODES.across}, B_ACROSS = ${GEMM_MODES.b_across};

// The order of a problem's tensor maps.
const u32 A = 0, B = 1, D = 2, C = 3, E = 4;
struct Problem { u64 maps[5]; float alpha, beta, gamma; u32 unused; };
// Row and column count tiles of ${GEMM_TILE.rows} x ${GEMM_TILE.cols}; problem is NONE where a cluster has no more work.
struct alignas(16) Tile { u32 problem; u16 row, col; u32 k_blocks; unsigned char mode, symmetric, addends, unused; };

__device__ inline u32 cluster_rank() { u32 x; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x)); return x; }
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{\\n.reg .pred p;\\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\\nselp.u32 %0, 1, 0, p;\\n}"
      : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
__device__ inline void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
__device__ inline void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
// At cluster scope the arrival would wait for all that the thread ever wrote; what it hands over here was only read.
__device__ inline void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile("{\\n.reg .b32 r;\\nmapa.shared::cluster.u32 r, %0, %1;\\nmbarrier.arrive.shared::cluster.b64 _, [r];\\n}"
    :: "r"(barrier), "r"(rank) : "memory");
}

// The host wrote the map by a copy, which the copy engine's cache of maps does not see by itself.
__device__ inline void acquire_map(u64 map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" :: "l"(map) : "memory");
}
__device__ inline void load_block(u32 to, u64 map, u32 x, u32 y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
    :: "r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}
__device__ inline void load_block_for_all(u32 to, u64 map, u32 x, u32 y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
    :: "r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
__device__ inline void store_block(u64 map, u32 x, u32 y, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
    :: "l"(map), "r"(x), "r"(y), "r"(from) : "memory");
}
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void store_wait_read_but_last() { asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory"); }
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Between the warp that acquires maps and the one that loads.
__device__ inline void maps_sync() { asm volatile("bar.sync 3, 64;" ::: "memory"); }

// Shared memory written by threads is about to be read by the copy engine; for the 128 threads of one warpgroup.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void group_sync(u32 group) { asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory"); }

// A shared memory descriptor: 8 rows of 128 bytes make 1024, and blocks of 64 columns follow each other.
__device__ inline u64 descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(BLOCK >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void multiply(float (&d)[${ACCUMULATORS}], u64 a, u64 b, u32 accumulate) {
  asm volatile("{\\n.reg .pred p;\\nsetp.ne.b32 p, %${ACCUMULATORS + 2}, 0;\\n"
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {${list(ACCUMULATORS, (i) => `%${i}`)}}, "
    "%${ACCUMULATORS}, %${ACCUMULATORS + 1}, p, 1, 1, %${ACCUMULATORS + 3}, %${ACCUMULATORS + 4};\\n}"
    : ${list(ACCUMULATORS, (i) => `"+f"(d[${i}])`)}
    : "l"(a), "l"(b), "r"(accumulate), "n"(A_ACROSS), "n"(B_ACROSS_K));
}
__device__ inline void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
// Keeps the compiler from moving reads of the sums across the wait.
__device__ inline void settle(float (&d)[${ACCUMULATORS}]) {
#pragma unroll
  for (int i = 0; i < ${ACCUMULATORS}; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

__device__ inline u32 pack(float low, float high) { u32 x; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low)); return x; }
__device__ inline float low(u32 x) { float y; asm("{\\n.reg .b16 l, h;\\nmov.b32 {l, h}, %1;\\ncvt.f32.f16 %0, l;\\n}" : "=f"(y) : "r"(x)); return y; }
__device__ inline float high(u32 x) { return low(x >> 16); }

__device__ inline void load_matrices(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ inline void store_matrices(u32 address, const u32 *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    :: "r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ inline void store_transposed(u32 address, const u32 *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
    :: "r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ inline void store_half(u32 address, u32 x) { asm volatile("st.shared.b16 [%0], %1;" :: "r"(address), "h"((u16)x) : "memory"); }

// Where a swizzled block has its 16 bytes 'chunk' of a row.
__device__ inline u32 chunk_at(u32 block, u32 row, u32 chunk) { return block + row * 128 + ((chunk ^ (row & 7)) << 4); }
__device__ inline u32 element_at(u32 block, u32 row, u32 col) { return chunk_at(block, row, col >> 3) + (col & 7) * 2; }

// The ring of stages, as one side of it walks.
struct Ring {
  u32 base, barriers, stage, phase;
  __device__ inline u32 slot() const { return base + stage * STAGE; }
  __device__ inline u32 full() const { return barriers + stage * 8; }
  __device__ inline u32 empty(u32 which) const { return barriers + (STAGES + which) * 8; }
  __device__ inline void advance() { if (++stage == STAGES) { stage = 0; phase ^= 1; } }
};

// Goes one tile ahead of the warp that loads, so that no load waits for it.
__device__ inline void acquire_maps(const Problem *problems, const Tile *tiles, u32 rounds, u32 lane) {
  const u32 clusters = gridDim.x / CLUSTER;
  u32 known = NONE;
  for (u32 round = 0; round < rounds; round++) {
    const Tile tile = tiles[round * clusters + blockIdx.x / CLUSTER];
    if (tile.problem == NONE) break;
    if (tile.problem != known && lane < 3 + tile.addends) acquire_map(problems[tile.problem].maps[lane]);
    known = tile.problem;
    __syncwarp();
    maps_sync();
  }
}

__device__ inline void load_tile(Ring &ring, const Tile &tile, const Problem &p, u32 rank) {
  const u32 row = (tile.row * CLUSTER + rank) * 128, col = tile.col * 256;
  const bool a_across = tile.mode == ACROSS, b_across = tile.mode != ALONG;
  for (u32 i = 0; i < tile.k_blocks; i++) {
    barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
    barrier_expect(ring.full(), STAGE);
    for (u32 j = 0; j < 2; j++) {
      const u32 at = row + j * 64;
      load_block(ring.slot() + j * BLOCK, p.maps[A], a_across ? at : i * 64, a_across ? i * 64 : at, ring.full());
    }
    for (u32 n = 0; n < 4 / CLUSTER; n++) {
      const u32 j = rank * (4 / CLUSTER) + n, at = col + j * 64;
      load_block_for_all(ring.slot() + (2 + j) * BLOCK, p.maps[B], b_across ? at : i * 64, b_across ? i * 64 : at, ring.full());
    }
    ring.advance();
  }
  const u32 passes = tile.addends > 1 ? 2 : 1;
  for (u32 pass = 0; pass < passes; pass++)
    for (u32 half = 0; half < 2; half++) {
      barrier_wait(ring.empty(ring.stage), ring.phase ^ 1);
      if (tile.addends == 0) barrier_arrive(ring.full());
      else {
        barrier_expect(ring.full(), 4 * BLOCK);
        for (u32 j = 0; j < 4; j++)
          load_block(ring.slot() + j * BLOCK, pass + 1 == passes ? p.maps[C] : p.maps[E], col + half * 128 + (j & 1) * 64, row + (j >> 1) * 64, ring.full());
      }
      ring.advance();
    }
}

__device__ inline void produce(Ring ring, const Problem *problems, const Tile *tiles, u32 rounds, u32 lane) {
  const u32 rank = cluster_rank(), clusters = gridDim.x / CLUSTER;
  for (u32 round = 0; round < rounds; round++) {
    const Tile tile = tiles[round * clusters + blockIdx.x / CLUSTER];
    if (tile.problem == NONE) break;
    const Problem p = problems[tile.problem];
    maps_sync();
    if (lane == 0) load_tile(ring, tile, p, rank);
    __syncwarp();
  }
}

// One of the two warpgroups that multiply; 'held' counts slots whose D the copy engine may still be reading.
struct Consumer {
  Ring ring;
  u32 group, warp, lane, mirror, held;
  __device__ inline bool elected() const { return warp == 0 && lane == 0; }
  __device__ inline void release(u32 stage) const {
    if (lane != 0) return;
    for (u32 rank = 0; rank < CLUSTER; rank++) barrier_arrive_at(ring.empty(stage), rank);
  }
  __device__ inline u32 before(u32 count) const { return (ring.stage + STAGES - count) % STAGES; }
  __device__ inline void release_held() {
    if (held == 0) return;
    if (elected()) store_wait_read();
    // The first slice of the new tile lies between.
    release(before(2));
    release(before(1));
    held = 0;
  }
};

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void multiply_slice(const Consumer &own, float (&d)[${ACCUMULATORS}], u32 accumulate) {
  barrier_wait(own.ring.full(), own.ring.phase);
  const u64 a = descriptor(own.ring.slot() + own.group * BLOCK), b = descriptor(own.ring.slot() + 2 * BLOCK);
  settle(d);
  multiply_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
    multiply<A_ACROSS, B_ACROSS_K>(d, a + k * (A_ACROSS ? 128 : 2), b + k * (B_ACROSS_K ? 128 : 2), accumulate + k);
  multiply_commit();
  settle(d);
}

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void accumulate(Consumer &own, float (&d)[${ACCUMULATORS}], u32 k_blocks) {
  multiply_slice<A_ACROSS, B_ACROSS_K>(own, d, 0);
  own.release_held();
  own.ring.advance();
  for (u32 i = 1; i < k_blocks; i++) {
    multiply_slice<A_ACROSS, B_ACROSS_K>(own, d, 1);
    multiply_wait<1>();
    own.release(own.before(1));
    own.ring.advance();
  }
  multiply_wait<0>();
  settle(d);
  own.release(own.before(1));
}

// d = scale·d + factor·(half a tile from the slot).
template <int HALF> __device__ inline void add(const Consumer &own, float (&d)[${ACCUMULATORS}], u32 slot, float scale, float factor) {
  const u32 row = own.warp * 16 + (own.lane & 15);
#pragma unroll
  for (int q = 0; q < 2; q++)
#pragma unroll
    for (int p = 0; p < 4; p++) {
      u32 x[4];
      load_matrices(x, chunk_at(slot + (own.group * 2 + q) * BLOCK, row, p * 2 + (own.lane >> 4)));
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float *at = d + HALF * 64 + q * 32 + p * 8 + i * 2;
        at[0] = at[0] * scale + low(x[i]) * factor;
        at[1] = at[1] * scale + high(x[i]) * factor;
      }
    }
}

// A block on the diagonal: the lower half as computed, the upper half its mirror.
__device__ inline void write_diagonal(const Consumer &own, u32 block, const u32 *x) {
#pragma unroll
  for (int p = 0; p < 4; p++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const u32 value = i & 1 ? x[p * 4 + i / 2] >> 16 : x[p * 4 + i / 2];
      const u32 row = own.warp * 16 + (i >> 1 & 1) * 8 + (own.lane >> 2), col = p * 16 + (i >> 2) * 8 + (own.lane & 3) * 2 + (i & 1);
      if (row >= col) store_half(element_at(block, row, col), value);
      if (row > col) store_half(element_at(block, col, row), value);
    }
}

// Writes the warp's 16 x 128 results into the group's two blocks; (row, col) is the first of the group's 64 x 128.
__device__ inline void write_lower(const Consumer &own, u32 blocks, const u32 (&x)[32], bool symmetric, u32 row, u32 col) {
#pragma unroll
  for (int q = 0; q < 2; q++) {
    if (symmetric && col + q * 64 == row) write_diagonal(own, blocks + q * BLOCK, x + q * 16);
    else if (!symmetric || col + q * 64 < row)
#pragma unroll
      for (int i = 0; i < 4; i++)
        store_matrices(chunk_at(blocks + q * BLOCK, own.warp * 16 + (own.lane & 15), i * 2 + (own.lane >> 4)), x + q * 16 + i * 4);
  }
}
__device__ inline void send_lower(u64 map, u32 blocks, bool symmetric, u32 row, u32 col) {
  for (u32 q = 0; q < 2; q++) if (!symmetric || col + q * 64 <= row) store_block(map, col + q * 64, row, blocks + q * BLOCK);
  store_commit();
}

__device__ inline void write_mirror(const Consumer &own, const u32 (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 8; i++)
    store_transposed(chunk_at(own.mirror + i / 4 * BLOCK, (i % 4 * 2 + (own.lane >> 4)) * 8 + (own.lane & 7), own.warp * 2 + (own.lane >> 3 & 1)), x + i * 4);
}
__device__ inline void send_mirror(u64 map, u32 blocks, u32 row, u32 col) {
  for (u32 q = 0; q < 2; q++) if (col + q * 64 < row) store_block(map, row, col + q * 64, blocks + q * BLOCK);
  store_commit();
}

// Writes half a tile from the sums into its slot, over the last addend, and sends it on its way.
template <int HALF> __device__ inline void finish(Consumer &own, float (&d)[${ACCUMULATORS}], const Tile &tile, const Problem &p, u32 row, u32 col) {
  const float scale = tile.addends > 1 ? 1 : p.alpha;
  barrier_wait(own.ring.full(), own.ring.phase);
  const u32 blocks = own.ring.slot() + own.group * 2 * BLOCK;
  if (tile.addends > 0) add<HALF>(own, d, own.ring.slot(), scale, p.beta);
  u32 x[32];
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const float *at = d + HALF * 64 + i * 2;
    x[i] = tile.addends > 0 ? pack(at[0], at[1]) : pack(at[0] * scale, at[1] * scale);
  }
  // A block on the diagonal is written where other warps read their addends.
  if (tile.symmetric) group_sync(own.group);
  write_lower(own, blocks, x, tile.symmetric, row, col);
  publish();
  group_sync(own.group);
  if (own.elected()) send_lower(p.maps[D], blocks, tile.symmetric, row, col);
  if (tile.symmetric && col < row) {
    if (HALF == 1) {
      // The first half's mirror may still be on its way.
      if (own.elected()) store_wait_read_but_last();
      group_sync(own.group);
    }
    write_mirror(own, x);
    publish();
    group_sync(own.group);
    if (own.elected()) send_mirror(p.maps[D], own.mirror, row, col);
  }
  own.ring.advance();
}

template <int HALF> __device__ inline void add_first(Consumer &own, float (&d)[${ACCUMULATORS}], const Problem &p) {
  barrier_wait(own.ring.full(), own.ring.phase);
  add<HALF>(own, d, own.ring.slot(), p.alpha, p.gamma);
  own.release(own.ring.stage);
  own.ring.advance();
}

__device__ inline void consume(Consumer own, const Problem *problems, const Tile *tiles, u32 rounds) {
  const u32 rank = cluster_rank(), clusters = gridDim.x / CLUSTER;
  float d[${ACCUMULATORS}];
  Tile tile = tiles[blockIdx.x / CLUSTER];
  for (u32 round = 0; round < rounds && tile.problem != NONE; round++) {
    const Problem p = problems[tile.problem];
    Tile next = tile;
    if (round + 1 < rounds) next = tiles[(round + 1) * clusters + blockIdx.x / CLUSTER];
    if (tile.mode == ALONG) accumulate<0, 0>(own, d, tile.k_blocks);
    else if (tile.mode == B_ACROSS) accumulate<0, 1>(own, d, tile.k_blocks);
    else accumulate<1, 1>(own, d, tile.k_blocks);
    if (tile.addends > 1) {
      add_first<0>(own, d, p);
      add_first<1>(own, d, p);
    }
    const u32 row = (tile.row * CLUSTER + rank) * 128 + own.group * 64, col = tile.col * 256;
    finish<0>(own, d, tile, p, row, col);
    finish<1>(own, d, tile, p, row, col + 128);
    own.held = 2;
    tile = next;
  }
  if (own.elected()) store_wait();
}

extern "C" __global__ void __launch_bounds__(${GEMM_THREADS}, 1) __cluster_dims__(${GEMM_CLUSTER}, 1, 1)
${GEMM_KERNEL}(const Problem *problems, const Tile *tiles, u64 rounds) {
  extern __shared__ unsigned char memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const u32 barriers = base + ${BARRIERS_AT};
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < STAGES; i++) {
      barrier_init(barriers + i * 8, 1);
      barrier_init(barriers + (STAGES + i) * 8, CONSUMER_WARPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const u32 group = threadIdx.x / 128;
  const Ring ring = {base, barriers, 0, 0};
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const u32 lane = threadIdx.x % 32;
    if (threadIdx.x / 32 == 8) produce(ring, problems, tiles, (u32)rounds, lane);
    if (threadIdx.x / 32 == 9) acquire_maps(problems, tiles, (u32)rounds, lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume({ring, group, threadIdx.x / 32 % 4, threadIdx.x % 32, base + ${MIRROR_AT} + group * 2 * BLOCK, 0}, problems, tiles, (u32)rounds);
  }
  __syncwarp();
  // The other block may still send data or signals here.
  cluster_sync();
}
`
