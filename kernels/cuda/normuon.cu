struct Second { double output_scale, b_v, b_g; };

__device__ inline float floored(float x) { return x > 1e-10f ? x : 1e-10f; }

// V' of one line of O; the sums for the rescaling go to 'own': squares before, check after.
__device__ inline void line_of(double squares, u64 length, const f32 *second, f32 *next, u64 line, const Second &s, Partial &own) {
  const float v = (float)(squares * s.output_scale * s.output_scale / (double)length);
  const float value = (second ? second[line].bits : 0) * (float)s.b_v + v * (float)s.b_g;
  next[line].bits = value;
  own.squares += v;
  own.check += (double)v / (double)floored(value);
}

// One warp sums up a row.
__device__ inline void second_by_row(const f16 *o, const f32 *second, f32 *next, u64 rows, u64 cols, Second s, Partial *partials, Part part) {
  Partial own = {0, 0, 0, 0};
  const u64 lane = threadIdx.x & 31;
  for (u64 row = part.index * 8 + threadIdx.x / 32; row < rows; row += part.count * 8) {
    double squares = 0;
    for (u64 i = lane; i < cols; i += 32) { const double x = load(o[row * cols + i]); squares += x * x; }
    for (int by = 16; by > 0; by >>= 1) squares += shuffle(squares, by);
    if (lane == 0) line_of(squares, cols, second, next, row, s, own);
  }
  own = reduce(own);
  if (threadIdx.x == 0) partials[part.index] = own;
}

// One block sums up 32 columns, each warp its share of the rows.
__device__ inline void second_by_col(const f16 *o, const f32 *second, f32 *next, u64 rows, u64 cols, Second s, Partial *partials, Part part) {
  __shared__ double sums[8][32];
  Partial own = {0, 0, 0, 0};
  const u64 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  for (u64 tile = part.index; tile * 32 < cols; tile += part.count) {
    const u64 col = tile * 32 + lane;
    double squares = 0;
    if (col < cols) for (u64 row = warp; row < rows; row += 8) { const double x = load(o[row * cols + col]); squares += x * x; }
    sums[warp][lane] = squares;
    __syncthreads();
    if (warp == 0 && col < cols) {
      for (int i = 1; i < 8; i++) squares += sums[i][lane];
      line_of(squares, rows, second, next, col, s, own);
    }
    __syncthreads();
  }
  own = reduce(own);
  if (threadIdx.x == 0) partials[part.index] = own;
}

// data = O/sqrt(max(V', floor)) with the norm of O, times what is left in 'factor'; 'partials' are those of second_by_row or second_by_col.
template <class T, int N> __device__ inline void even(const f16 *o, T *data, u64 count, double factor, const f32 *second, u64 cols, u64 by_row, const Partial *partials, u64 blocks, Part part) {
  typedef Pack<f16, N> H;
  typedef Pack<T, N> D;
  __shared__ float shared_factor;
  Partial sum = {0, 0, 0, 0};
  for (u64 i = threadIdx.x; i < blocks; i += blockDim.x) add(sum, 0, partials[i].squares, partials[i].check, 0);
  sum = reduce(sum);
  if (threadIdx.x == 0) shared_factor = (float)(sum.check > 0 ? factor * sqrt(sum.squares / sum.check) : 0);
  __syncthreads();
  const float scale = shared_factor;
  FOR_EACH(i, count) {
    H h = ((const H *)o)[i];
    D d;
    u64 row = i * N / cols, col = i * N - row * cols;
    for (int k = 0; k < N; k++) {
      store(d.at[k], load(h.at[k]) * scale / sqrtf(floored(second[by_row ? row : col].bits)));
      if (++col == cols) { col = 0; row++; }
    }
    ((D *)data)[i] = d;
  }
}
