// Newton-Schulz of matrices whose shorter side is at most 64. X has 'side' lines of 'length' elements: its rows, or its
// columns where it is 'tall'. R = XXᵀ (XᵀX of a tall X) and all that follows from it are matrices of side x side in
// float64: iterations on R alone multiply its rounding with the a² of every one of them, and in float32 a singular value
// near 0 would come out as noise or without bound. X and the result are float32.
const u32 SMALL_SIDE = 64;
// Elements of a slab of X in shared memory: that many whole positions of all lines, with one free element behind each.
const u32 SLAB = 2080;
// Threads are a square of 16 x 16, and each has the elements of a matrix that lie 16 rows and columns apart.
const u32 THREAD_SIDE = 16, TILES = SMALL_SIDE / THREAD_SIDE;

// The positions of the lines that a block takes.
struct Positions { u64 begin, end; };
__device__ inline Positions positions_of(u64 length, const Part &part) {
  const u64 span = (length + part.count - 1) / part.count, begin = part.index * span;
  return {begin, begin + span < length ? begin + span : length};
}

// Where an element lies: number 'i' of a slab of 'count' positions, such that neighbours of a warp are neighbours in X.
struct Place { u32 line, position; };
__device__ inline Place place_of(u32 i, u32 side, u32 count, u64 tall) {
  if (tall) return {i % side, i / side};
  return {i / count, i % count};
}
__device__ inline u64 index_of(Place at, u64 first, u64 side, u64 length, u64 tall) {
  return tall ? (first + at.position) * side + at.line : at.line * length + first + at.position;
}

// Copies 'count' positions of every line from position 'first' on.
__device__ inline void load_slab(double *slab, const f32 *x, u32 side, u64 length, u64 tall, u64 first, u32 count) {
  __syncthreads();
  for (u32 i = threadIdx.x; i < side * count; i += blockDim.x) {
    const Place at = place_of(i, side, count, tall);
    slab[at.position * (side + 1) + at.line] = load(x[index_of(at, first, side, length, tall)]);
  }
  __syncthreads();
}

__device__ inline u32 slab_count(u32 side, u64 rest) {
  const u32 most = SLAB / (side + 1);
  return rest < most ? (u32)rest : most;
}

// Adds the products of one position's elements; a row or column past the side repeats the last one and is not stored.
__device__ inline void add_products(double (&sum)[TILES][TILES], const double *a, u32 a_step, const double *b, u32 b_step, u32 side, u32 row, u32 col) {
  const u32 tiles = (side + THREAD_SIDE - 1) / THREAD_SIDE;
  double right[TILES];
#pragma unroll
  for (u32 j = 0; j < TILES; j++) if (j < tiles) right[j] = b[min(col + j * THREAD_SIDE, side - 1) * b_step];
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
    if (i < tiles) {
      const double left = a[min(row + i * THREAD_SIDE, side - 1) * a_step];
#pragma unroll
      for (u32 j = 0; j < TILES; j++) if (j < tiles) sum[i][j] = __fma_rn(left, right[j], sum[i][j]);
    }
}

// Calls f(row, col, sum) for every element of a thread.
template <class F> __device__ inline void for_own(const double (&sum)[TILES][TILES], u32 side, u32 row, u32 col, F f) {
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 j = 0; j < TILES; j++) {
      const u32 own_row = row + i * THREAD_SIDE, own_col = col + j * THREAD_SIDE;
      if (own_row < side && own_col < side) f(own_row, own_col, sum[i][j]);
    }
}

// The block's part of R. Below 16 lines several groups of threads each take every so many-th position.
__device__ inline void small_gram(const f32 *x, double *grams, u64 lines, u64 length, u64 tall, Part part) {
  __shared__ double slab[SLAB];
  __shared__ double sums[THREAD_SIDE * THREAD_SIDE];
  const u32 side = (u32)lines, square = min(side, THREAD_SIDE), size = square * square;
  const u32 groups = THREAD_SIDE * THREAD_SIDE / size, group = threadIdx.x / size;
  const u32 row = threadIdx.x % size / square, col = threadIdx.x % square;
  const Positions own = positions_of(length, part);
  double sum[TILES][TILES] = {};
  for (u64 first = own.begin; first < own.end;) {
    const u32 count = slab_count(side, own.end - first);
    load_slab(slab, x, side, length, tall, first, count);
    if (group < groups)
      for (u32 k = group; k < count; k += groups) {
        const double *at = slab + k * (side + 1);
        add_products(sum, at, 1, at, 1, side, row, col);
      }
    first += count;
  }
  double *gram = grams + part.index * side * side;
  if (groups == 1) {
    if (group == 0) for_own(sum, side, row, col, [&](u32 i, u32 j, double value) { gram[i * side + j] = value; });
    return;
  }
  sums[threadIdx.x] = sum[0][0];
  __syncthreads();
  if (threadIdx.x >= size) return;
  double total = 0;
  for (u32 i = 0; i < groups; i++) total += sums[i * size + threadIdx.x];
  gram[threadIdx.x] = total;
}

// D = alpha·AB + beta·A + gamma·I, which may be written over A or B.
__device__ inline void small_product(const double *a, const double *b, double *d, u32 side, double alpha, double beta, double gamma) {
  const u32 row = threadIdx.x / THREAD_SIDE, col = threadIdx.x % THREAD_SIDE;
  double sum[TILES][TILES] = {};
  for (u32 k = 0; k < side; k++) add_products(sum, a + k, side, b + k * side, 1, side, row, col);
#pragma unroll
  for (u32 i = 0; i < TILES; i++)
#pragma unroll
    for (u32 j = 0; j < TILES; j++) {
      const u32 own_row = min(row + i * THREAD_SIDE, side - 1), own_col = min(col + j * THREAD_SIDE, side - 1);
      const double addend = beta * a[own_row * side + own_col] + (own_row == own_col ? gamma : 0);
      sum[i][j] = alpha * sum[i][j] + addend;
    }
  __syncthreads();
  for_own(sum, side, row, col, [&](u32 i, u32 j, double value) { d[i * side + j] = value; });
  __syncthreads();
}

// One block carries out 'count' iterations of the coefficients (a, b, c) in 'triples' on R alone:
//
//     M = aI + bR + cRR, P <- MP, R <- MRM
//
// P, which starts as I, is what X is to be multiplied with. R is the sum of 'parts' matrices; 'work' is R, P and M.
__device__ inline void small_iterate(const double *grams, u64 parts, double *work, u64 lines, const double *triples, u64 count, Part) {
  const u32 side = (u32)lines, size = side * side;
  double *r = work, *p = work + size, *m = work + 2 * size;
  for (u32 i = threadIdx.x; i < size; i += blockDim.x) {
    double sum = 0;
    for (u64 part = 0; part < parts; part++) sum += grams[part * size + i];
    r[i] = sum;
    p[i] = i / side == i % side;
  }
  __syncthreads();
  for (u64 k = 0; k < count; k++) {
    small_product(r, r, m, side, triples[3 * k + 2], triples[3 * k + 1], triples[3 * k]);
    small_product(m, p, p, side, 1, 0, 0);
    if (k + 1 == count) break;
    small_product(m, r, r, side, 1, 0, 0);
    small_product(r, m, r, side, 1, 0, 0);
  }
}

// O = PX, or XP of a tall X.
__device__ inline void small_apply(const double *p, const f32 *x, f32 *o, u64 lines, u64 length, u64 tall, Part part) {
  __shared__ double slab[SLAB];
  const u32 side = (u32)lines;
  const Positions own = positions_of(length, part);
  for (u64 first = own.begin; first < own.end;) {
    const u32 count = slab_count(side, own.end - first);
    load_slab(slab, x, side, length, tall, first, count);
    for (u32 i = threadIdx.x; i < side * count; i += blockDim.x) {
      const Place at = place_of(i, side, count, tall);
      const double *elements = slab + at.position * (side + 1);
      const double *factors = tall ? p + at.line : p + at.line * side;
      double sum = 0;
      for (u32 k = 0; k < side; k++) sum = __fma_rn(factors[tall ? k * side : k], elements[k], sum);
      store(o[index_of(at, first, side, length, tall)], (float)sum);
    }
    first += count;
  }
}
