struct Momentum { double gradient_scale, c_m, c_g, n_m, n_g; };

// B' = c_m B + c_g G and u = n_m B' + n_g G, of B' as it was rounded to its type; 'buffer' is null before the first step.
__device__ inline float next_buffer(float g, float b, const Momentum &s) { return b * (float)s.c_m + g * (float)s.c_g; }
__device__ inline float direction(float g, float b, const Momentum &s) { return b * (float)s.n_m + g * (float)s.n_g; }
template <class T> __device__ inline float scaled(T g, const Momentum &s) { return load(g) * (float)s.gradient_scale; }

// Of matrices of 'count' packs, which lie one behind the other, each has 'matrix_blocks' of the part's blocks. Where
// 'scans' is set the gradient is scanned, and copied where 'copy' is not null: then 'check' is the sum of its squares.
template <class T, class B, int N> __device__ inline void momentum(const T *gradient, const B *buffer, B *next, u64 count, u64 matrix_blocks, u64 scans, u64 first_word, T *copy, Momentum s, Partial *partials, Part part) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  Partial own = {0, 0, 0, 0};
  const u64 first = part.index / matrix_blocks * count;
  for (u64 i = part.index % matrix_blocks * blockDim.x + threadIdx.x; i < count; i += matrix_blocks * blockDim.x) {
    G g = ((const G *)gradient)[first + i];
    if (copy) ((G *)copy)[first + i] = g;
    if (scans) scan_pack(g, first_word, first + i, own.print, own.check);
    F b = {};
    if (buffer) b = ((const F *)buffer)[first + i];
    F n;
    for (int k = 0; k < N; k++) {
      const float value = scaled(g.at[k], s);
      store(n.at[k], next_buffer(value, load(b.at[k]), s));
      const double u = direction(value, load(n.at[k]), s);
      own.squares += u * u;
      own.largest = own.largest > fabs(u) ? own.largest : fabs(u);
    }
    ((F *)next)[first + i] = n;
  }
  own = reduce(own);
  if (!scans) own.check = own.squares;
  if (threadIdx.x == 0) partials[part.index] = own;
}

// X = u / max(norm, eps) times input_scale; 'partials' are the 'blocks' partial sums of the matrix.
template <class T, class B, class X, int N> __device__ inline void normalize(const T *gradient, const B *next, X *x, u64 count, Momentum s, double eps, double input_scale, const Partial *partials, u64 blocks, Part part) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  typedef Pack<X, N> H;
  __shared__ double shared_factor;
  Partial sum = {0, 0, 0, 0};
  for (u64 i = threadIdx.x; i < blocks; i += blockDim.x) add(sum, 0, partials[i].squares, 0, partials[i].largest);
  sum = reduce(sum);
  if (threadIdx.x == 0) {
    const double norm = sqrt(sum.squares), least = eps * sum.largest;
    shared_factor = sum.largest > 0 ? input_scale / (norm > least ? norm : least) : 0;
  }
  __syncthreads();
  const double factor = shared_factor;
  FOR_EACH(i, count) {
    G g = ((const G *)gradient)[i];
    F n = ((const F *)next)[i];
    H out;
    for (int k = 0; k < N; k++) store(out.at[k], (float)(direction(scaled(g.at[k], s), load(n.at[k]), s) * factor));
    ((H *)x)[i] = out;
  }
}

// data = O times factor, which is scanned where 'scans' is set.
template <class X, class T, int N> __device__ inline void finish(const X *o, T *data, u64 count, double factor, u64 scans, u64 first_word, Partial *partials, Part part) {
  typedef Pack<X, N> H;
  typedef Pack<T, N> D;
  Partial own = {0, 0, 0, 0};
  FOR_EACH(i, count) {
    H h = ((const H *)o)[i];
    D d;
    for (int k = 0; k < N; k++) store(d.at[k], load(h.at[k]) * (float)factor);
    ((D *)data)[i] = d;
    if (scans) scan_pack(d, first_word, i, own.print, own.squares);
  }
  if (!scans) return;
  own = reduce(own);
  if (threadIdx.x == 0) partials[part.index] = own;
}

// 'to' is 'from' with rows and columns of zeros added behind its own, or without those that it has no room for.
__device__ inline void resize(const f16 *from, u64 from_rows, u64 from_cols, f16 *to, u64 rows, u64 cols, Part part) {
  FOR_EACH(i, rows * cols) {
    const u64 row = i / cols, col = i - row * cols;
    to[i].bits = row < from_rows && col < from_cols ? from[row * from_cols + col].bits : 0;
  }
}
