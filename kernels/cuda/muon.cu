struct Momentum { double gradient_scale, c_m, c_g, n_m, n_g; };

// B' = c_m B + c_g G and u = n_m B' + n_g G, of B' as it was rounded to its type; 'buffer' is null before the first step.
__device__ inline float next_buffer(float g, float b, const Momentum &s) { return b * (float)s.c_m + g * (float)s.c_g; }
__device__ inline float direction(float g, float b, const Momentum &s) { return b * (float)s.n_m + g * (float)s.n_g; }
template <class T> __device__ inline float scaled(T g, const Momentum &s) { return load(g) * (float)s.gradient_scale; }

// Of matrices of 'count' packs, which lie one behind the other, each has 'matrix_blocks' of the part's blocks.
template <class T, class B, int N> __device__ inline void momentum(const T *gradient, const B *buffer, B *next, u64 count, u64 matrix_blocks, Momentum s, Partial *partials, Part part) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  Partial own = {0, 0, 0, 0};
  const u64 first = part.index / matrix_blocks * count;
  for (u64 i = part.index % matrix_blocks * blockDim.x + threadIdx.x; i < count; i += matrix_blocks * blockDim.x) {
    G g = ((const G *)gradient)[first + i];
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
  own.check = own.squares;
  if (threadIdx.x == 0) partials[part.index] = own;
}

// X = u / max(norm, eps) times input_scale; 'partials' are the 'blocks' partial sums of the matrix.
template <class T, class B, int N> __device__ inline void normalize(const T *gradient, const B *next, f16 *x, u64 count, Momentum s, double eps, double input_scale, const Partial *partials, u64 blocks, Part part) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  typedef Pack<f16, N> H;
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

// data = O times factor.
template <class T, int N> __device__ inline void finish(const f16 *o, T *data, u64 count, double factor, Part part) {
  typedef Pack<f16, N> H;
  typedef Pack<T, N> D;
  FOR_EACH(i, count) {
    H h = ((const H *)o)[i];
    D d;
    for (int k = 0; k < N; k++) store(d.at[k], load(h.at[k]) * (float)factor);
    ((D *)data)[i] = d;
  }
}
