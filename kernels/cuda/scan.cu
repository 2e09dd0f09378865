template <class T> __device__ inline double squares_of(u64 word) {
  const int count = 8 / sizeof(T);
  union { u64 word; T at[count]; } both = {word};
  double sum = 0;
  for (int i = 0; i < count; i++) { double x = load(both.at[i]); sum += x * x; }
  return sum;
}

// One pass over a tensor's bytes; the sum of squares is not finite exactly where an element is not.
template <class T> __device__ inline void scan(const u64 *words, u64 bytes, Partial *partials) {
  Partial own = {0, 0, 0, 0};
  const u64 pairs = bytes / 16;
  const u64 stride = (u64)gridDim.x * blockDim.x;
  const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (u64 i = thread; i < pairs; i += stride) {
    ulonglong2 two = ((const ulonglong2 *)words)[i];
    own.print += print_of(two.x, 2 * i) + print_of(two.y, 2 * i + 1);
    own.squares += squares_of<T>(two.x) + squares_of<T>(two.y);
  }
  if (thread == 0) {
    const unsigned char *rest = (const unsigned char *)words;
    for (u64 at = pairs * 16; at < bytes; at += 8) {
      u64 word = 0;
      for (u64 i = at; i < bytes && i < at + 8; i++) word |= (u64)rest[i] << (8 * (i - at));
      own.print += print_of(word, at / 8);
      own.squares += squares_of<T>(word);
    }
  }
  own = reduce(own);
  if (threadIdx.x == 0) partials[blockIdx.x] = own;
}
