typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

const u32 CLUSTER = 2, STAGES = 4, BLOCK = 8192, STAGE = 49152;
const u32 CONSUMER_WARPS = 8, NONE = 0xffffffff;
const u32 ALONG = 0, ACROSS = 1, B_ACROSS = 2;

// The order of a problem's tensor maps.
const u32 A = 0, B = 1, D = 2, C = 3, E = 4;
struct Problem { u64 maps[5]; float alpha, beta, gamma, diagonal; };
// Row and column count tiles of 256 x 256; problem is NONE where a cluster has no more work.
struct alignas(16) Tile { u32 problem; u16 row, col; u32 k_blocks; unsigned char mode, symmetric, addends, unused; };

__device__ inline u32 cluster_rank() { u32 x; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x)); return x; }
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
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
  asm volatile("{\n.reg .b32 r;\nmapa.shared::cluster.u32 r, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [r];\n}"
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

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void multiply(float (&d)[128], u64 a, u64 b, u32 accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
    "%128, %129, p, 1, 1, %131, %132;\n}"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
    : "l"(a), "l"(b), "r"(accumulate), "n"(A_ACROSS), "n"(B_ACROSS_K));
}
__device__ inline void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
// Keeps the compiler from moving reads of the sums across the wait.
__device__ inline void settle(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

__device__ inline u32 pack(float low, float high) { u32 x; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low)); return x; }
__device__ inline float low(u32 x) { float y; asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %1;\ncvt.f32.f16 %0, l;\n}" : "=f"(y) : "r"(x)); return y; }
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

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void multiply_slice(const Consumer &own, float (&d)[128], u32 accumulate) {
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

template <int A_ACROSS, int B_ACROSS_K> __device__ inline void accumulate(Consumer &own, float (&d)[128], u32 k_blocks) {
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
template <int HALF> __device__ inline void add(const Consumer &own, float (&d)[128], u32 slot, float scale, float factor) {
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

// Adds 'diagonal' to the elements on the diagonal of block q, which lies on it: the 16 rows of a warp cross it in 16
// columns.
template <int HALF> __device__ inline void add_diagonal(const Consumer &own, float (&d)[128], u32 q, float diagonal) {
#pragma unroll
  for (int i = 0; i < 64; i++)
    if ((i >> 1 & 1) == (i >> 2 & 1) && i / 32 == q && i / 8 % 4 == own.warp && own.lane >> 2 == (own.lane & 3) * 2 + (i & 1))
      d[HALF * 64 + i] += diagonal;
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
template <int HALF> __device__ inline void finish(Consumer &own, float (&d)[128], const Tile &tile, const Problem &p, u32 row, u32 col) {
  const float scale = tile.addends > 1 ? 1 : p.alpha;
  barrier_wait(own.ring.full(), own.ring.phase);
  const u32 blocks = own.ring.slot() + own.group * 2 * BLOCK;
  if (tile.addends > 0) add<HALF>(own, d, own.ring.slot(), scale, p.beta);
  else
#pragma unroll
    for (int i = 0; i < 64; i++) d[HALF * 64 + i] *= scale;
  if (p.diagonal != 0 && tile.symmetric && row >= col && row < col + 128) add_diagonal<HALF>(own, d, (row - col) / 64, p.diagonal);
  u32 x[32];
#pragma unroll
  for (int i = 0; i < 32; i++) x[i] = pack(d[HALF * 64 + i * 2], d[HALF * 64 + i * 2 + 1]);
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

template <int HALF> __device__ inline void add_first(Consumer &own, float (&d)[128], const Problem &p) {
  barrier_wait(own.ring.full(), own.ring.phase);
  add<HALF>(own, d, own.ring.slot(), p.alpha, p.gamma);
  own.release(own.ring.stage);
  own.ring.advance();
}

__device__ inline void consume(Consumer own, const Problem *problems, const Tile *tiles, u32 rounds) {
  const u32 rank = cluster_rank(), clusters = gridDim.x / CLUSTER;
  float d[128];
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

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
gemm(const Problem *problems, const Tile *tiles, u64 rounds) {
  extern __shared__ unsigned char memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const u32 barriers = base + 229376;
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
    consume({ring, group, threadIdx.x / 32 % 4, threadIdx.x % 32, base + 196608 + group * 2 * BLOCK, 0}, problems, tiles, (u32)rounds);
  }
  __syncwarp();
  // The other block may still send data or signals here.
  cluster_sync();
}
