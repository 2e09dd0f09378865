template <class T> __device__ inline double squares_of(u64 word) {
  const int count = 8 / sizeof(T);
  union { u64 word; T at[count]; } both = {word};
  double sum = 0;
  for (int i = 0; i < count; i++) { double x = load(both.at[i]); sum += x * x; }
  return sum;
}

// Adds the words of a pack to the fingerprint and the squares of its tensor, of which it is number 'index' from word
// 'first' on. Packs that are no whole words are never scanned.
template <class T, int N> __device__ inline void scan_pack(const Pack<T, N> &pack, u64 first, u64 index, u64 &print, double &squares) {
  if constexpr (N * sizeof(T) % 8 == 0) {
    const int count = N * sizeof(T) / 8;
    union { Pack<T, N> pack; u64 at[count]; } words = {pack};
    for (int k = 0; k < count; k++) {
      print += print_of(words.at[k], first + index * count + k);
      squares += squares_of<T>(words.at[k]);
    }
  }
}

// One pass over a tensor's bytes, which are copied where 'copy' is not null: then what was scanned is what is computed
// with. The sum of squares is not finite exactly where an element is not.
template <class T> __device__ inline void scan(const u64 *words, u64 *copy, u64 bytes, Partial *partials, Part part) {
  Partial own = {0, 0, 0, 0};
  const u64 pairs = bytes / 16;
  FOR_EACH(i, pairs) {
    const ulonglong2 two = ((const ulonglong2 *)words)[i];
    if (copy) ((ulonglong2 *)copy)[i] = two;
    own.print += print_of(two.x, 2 * i) + print_of(two.y, 2 * i + 1);
    own.squares += squares_of<T>(two.x) + squares_of<T>(two.y);
  }
  if (part.index == 0 && threadIdx.x == 0) {
    const unsigned char *rest = (const unsigned char *)words;
    unsigned char *rest_copy = (unsigned char *)copy;
    for (u64 at = pairs * 16; at < bytes; at += 8) {
      u64 word = 0;
      for (u64 i = at; i < bytes && i < at + 8; i++) {
        const unsigned char byte = rest[i];
        if (copy) rest_copy[i] = byte;
        word |= (u64)byte << (8 * (i - at));
      }
      own.print += print_of(word, at / 8);
      own.squares += squares_of<T>(word);
    }
  }
  own = reduce(own);
  if (threadIdx.x == 0) partials[part.index] = own;
}
