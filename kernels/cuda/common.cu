typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

struct f32 { float bits; };
struct f16 { u16 bits; };
struct bf16 { u16 bits; };

__device__ inline float load(f32 x) { return x.bits; }
__device__ inline float load(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ inline float load(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ inline void store(f32 &x, float y) { x.bits = y; }
__device__ inline void store(bf16 &x, float y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(x.bits) : "f"(y)); }
__device__ inline void store(f16 &x, float y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x.bits) : "f"(y)); }

template <class T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

// What one block found: the largest |u| beside the sums, because the norm must be told from an eps at any scale.
struct Partial { u64 print; double squares; double check; double largest; };

__device__ inline double shuffle(double x, int by) { return __shfl_down_sync(~0u, x, by); }
__device__ inline u64 shuffle(u64 x, int by) { return __shfl_down_sync(~0u, x, by); }

__device__ inline void add(Partial &a, u64 print, double squares, double check, double largest) {
  a.print += print;
  a.squares += squares;
  a.check += check;
  a.largest = a.largest > largest ? a.largest : largest;
}

// The block's sum, in an order that never changes; thread 0 has it.
__device__ inline Partial reduce(Partial own) {
  __shared__ Partial warps[256 / 32];
  for (int by = 16; by > 0; by >>= 1)
    add(own, shuffle(own.print, by), shuffle(own.squares, by), shuffle(own.check, by), shuffle(own.largest, by));
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = own;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < 256 / 32; i++) add(own, warps[i].print, warps[i].squares, warps[i].check, warps[i].largest);
  __syncthreads();
  return own;
}
