import type { Dtype } from '../dtype.js'
import { FINGERPRINT } from '../fingerprint.js'
import type { KernelSpec, StateIo } from '../kernel.js'
import { elementwiseSource } from './elementwise.js'
import { normuonSource } from './normuon.js'

/** How the source names an element type. */
const TYPE_NAMES = { float32: 'f32', float16: 'f16', bfloat16: 'bf16' } as const satisfies Record<Dtype, string>

/** Elements that one thread handles at a time: `vector` where every matrix starts and ends on a multiple of it. */
export const VECTOR = 4

/** Threads of a block, and the most blocks for one matrix or tensor: partial sums, and with them every bit, do not depend on the card. */
export const THREADS = 256
export const MAX_BLOCKS = 512
/** Sizes of `Partial` and `Result` below. */
export const PARTIAL_BYTES = 32
export const RESULT_BYTES = 40

/** How to compile it for a compute capability such as `9.0`. */
export const CUDA_OPTIONS = (computeCapability: string) => [
  `--gpu-architecture=sm_${computeCapability.replace('.', '')}`,
  '--std=c++17',
  '--fmad=false',
]

/** The kernels of this source. Every parameter of every kernel has 8 bytes: a pointer, a u64 or a double. */
export const CUDA_KERNELS = {
  scan: (dtype: Dtype) => `scan_${TYPE_NAMES[dtype]}`,
  momentum: (types: MomentumTypes, vector: boolean) => `momentum_${momentumTypes(types)}_${vector ? VECTOR : 1}`,
  normalize: (types: MomentumTypes, vector: boolean) => `normalize_${momentumTypes(types)}_${vector ? VECTOR : 1}`,
  finish: (dtype: Dtype, vector: boolean) => `finish_${TYPE_NAMES[dtype]}_${vector ? VECTOR : 1}`,
  second: (per: 'row' | 'col') => `second_${per}`,
  even: (dtype: Dtype, vector: boolean) => `even_${TYPE_NAMES[dtype]}_${vector ? VECTOR : 1}`,
  elementwise: (spec: KernelSpec) => {
    const kind = spec.kind === 'adamw' && spec.amsgrad ? 'amsgrad' : spec.kind
    return `${kind}_${TYPE_NAMES[spec.gradient_dtype]}_${TYPE_NAMES[spec.update_dtype]}`
  },
  collect: () => 'collect',
} as const

/** The gradient's type, and that of the momentum buffer where it is not float32. */
type MomentumTypes = { readonly gradient_dtype: Dtype; readonly momentum_dtype?: StateIo['dtype'] }

function momentumTypes({ gradient_dtype, momentum_dtype = 'float32' }: MomentumTypes): string {
  return `${TYPE_NAMES[gradient_dtype]}_${TYPE_NAMES[momentum_dtype]}`
}

const BUFFER_NAMES = [TYPE_NAMES.float32, TYPE_NAMES.bfloat16]
const PACKS = [1, VECTOR]
const DTYPE_NAMES = Object.values(TYPE_NAMES)
const pairs = DTYPE_NAMES.flatMap((from) => DTYPE_NAMES.map((to) => [from, to] as const))

/**
 * The elementwise parts of every algorithm in CUDA C++, compiled at start-up. No header is needed. To be compiled without
 * contraction to fused multiply-adds, so that a replay's 1·B + 0·G is B and the results are those of the ONNX form.
 *
 * The matrix products are ONNX Runtime's part; `normalize` writes what they read and `finish` reads what they write.
 */
export const CUDA_SOURCE = `
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
  __shared__ Partial warps[${THREADS} / 32];
  for (int by = 16; by > 0; by >>= 1)
    add(own, shuffle(own.print, by), shuffle(own.squares, by), shuffle(own.check, by), shuffle(own.largest, by));
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = own;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < ${THREADS} / 32; i++) add(own, warps[i].print, warps[i].squares, warps[i].check, warps[i].largest);
  __syncthreads();
  return own;
}

${fingerprintSource()}
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

struct Momentum { double gradient_scale, c_m, c_g, n_m, n_g; };

// B' = c_m B + c_g G and u = n_m B' + n_g G, of B' as it was rounded to its type; 'buffer' is null before the first step.
__device__ inline float next_buffer(float g, float b, const Momentum &s) { return b * (float)s.c_m + g * (float)s.c_g; }
__device__ inline float direction(float g, float b, const Momentum &s) { return b * (float)s.n_m + g * (float)s.n_g; }
template <class T> __device__ inline float scaled(T g, const Momentum &s) { return load(g) * (float)s.gradient_scale; }

// Grid: x blocks for each matrix of 'count' packs, y matrices that lie one behind the other.
template <class T, class B, int N> __device__ inline void momentum(const T *gradient, const B *buffer, B *next, u64 count, Momentum s, Partial *partials) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  Partial own = {0, 0, 0, 0};
  const u64 first = count * blockIdx.y;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
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
  if (threadIdx.x == 0) partials[(u64)blockIdx.y * gridDim.x + blockIdx.x] = own;
}

// X = u / max(norm, eps) times input_scale; 'sums' are the partial sums of the matrix, 'blocks' of them each.
template <class T, class B, int N> __device__ inline void normalize(const T *gradient, const B *next, f16 *x, u64 count, Momentum s, double eps, double input_scale, const Partial *partials, u64 blocks) {
  typedef Pack<T, N> G;
  typedef Pack<B, N> F;
  typedef Pack<f16, N> H;
  __shared__ double shared_factor;
  Partial sum = {0, 0, 0, 0};
  const Partial *own = partials + blocks * blockIdx.y;
  for (u64 i = threadIdx.x; i < blocks; i += blockDim.x) add(sum, 0, own[i].squares, 0, own[i].largest);
  sum = reduce(sum);
  if (threadIdx.x == 0) {
    const double norm = sqrt(sum.squares), least = eps * sum.largest;
    shared_factor = sum.largest > 0 ? input_scale / (norm > least ? norm : least) : 0;
  }
  __syncthreads();
  const double factor = shared_factor;
  const u64 first = count * blockIdx.y;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
    G g = ((const G *)gradient)[first + i];
    F n = ((const F *)next)[first + i];
    H out;
    for (int k = 0; k < N; k++) store(out.at[k], (float)(direction(scaled(g.at[k], s), load(n.at[k]), s) * factor));
    ((H *)x)[first + i] = out;
  }
}

// data = O times factor.
template <class T, int N> __device__ inline void finish(const f16 *o, T *data, u64 count, double factor) {
  typedef Pack<f16, N> H;
  typedef Pack<T, N> D;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
    H h = ((const H *)o)[i];
    D d;
    for (int k = 0; k < N; k++) store(d.at[k], load(h.at[k]) * (float)factor);
    ((D *)data)[i] = d;
  }
}

__device__ inline Partial total(const Partial *partials, u64 count) {
  Partial sum = {0, 0, 0, 0};
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) add(sum, partials[i].print, partials[i].squares, partials[i].check, 0);
  return reduce(sum);
}

struct Result { u64 gradient_print, update_print; double gradient_squares, update_squares, check; };

// One block sums what the others found into memory that the host reads.
extern "C" __global__ void collect(const Partial *gradient, u64 gradient_blocks, u64 gradient_bytes, const Partial *update, u64 update_blocks, u64 update_bytes, const Partial *checks, u64 check_blocks, volatile Result *result) {
  const Partial g = total(gradient, gradient_blocks), u = total(update, update_blocks), c = total(checks, check_blocks);
  if (threadIdx.x != 0) return;
  result->gradient_print = g.print + mix(gradient_bytes);
  result->gradient_squares = g.squares;
  result->update_print = u.print + mix(update_bytes);
  result->update_squares = u.squares;
  result->check = c.check;
}

${DTYPE_NAMES.map(
  (type) => `
extern "C" __global__ void scan_${type}(const u64 *words, u64 bytes, Partial *partials) { scan<${type}>(words, bytes, partials); }
${PACKS.map((n) => matrixKernels(type, n)).join('')}`,
).join('')}
${normuonSource(
  THREADS,
  DTYPE_NAMES.flatMap((type) => PACKS.map((pack) => ({ type, pack }))),
)}
${elementwiseSource(pairs)}
`

function fingerprintSource(): string {
  const { step, first, second, shifts } = FINGERPRINT
  const hex = (value: bigint) => `0x${value.toString(16)}ull`
  return `// Fingerprint of docs/protocol.md.
__device__ inline u64 mix(u64 x) {
  x ^= x >> ${shifts[0]};
  x *= ${hex(first)};
  x ^= x >> ${shifts[1]};
  x *= ${hex(second)};
  return x ^ (x >> ${shifts[2]});
}
__device__ inline u64 print_of(u64 word, u64 index) { return mix(word + (index + 1) * ${hex(step)}); }
`
}

function matrixKernels(type: string, n: number): string {
  const momentum = BUFFER_NAMES.map(
    (buffer) => `
extern "C" __global__ void momentum_${type}_${buffer}_${n}(const ${type} *gradient, const ${buffer} *buffer, ${buffer} *next, u64 count, Momentum s, Partial *partials) { momentum<${type}, ${buffer}, ${n}>(gradient, buffer, next, count, s, partials); }
extern "C" __global__ void normalize_${type}_${buffer}_${n}(const ${type} *gradient, const ${buffer} *next, f16 *x, u64 count, Momentum s, double eps, double input_scale, const Partial *partials, u64 blocks) { normalize<${type}, ${buffer}, ${n}>(gradient, next, x, count, s, eps, input_scale, partials, blocks); }`,
  )
  return `${momentum.join('')}
extern "C" __global__ void finish_${type}_${n}(const f16 *o, ${type} *data, u64 count, double factor) { finish<${type}, ${n}>(o, data, count, factor); }`
}
