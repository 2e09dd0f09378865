__device__ inline float number(const f32 *x, u64 i) { return x ? x[i].bits : 0; }
__device__ inline float at_least(float x, float least) { return x > least ? x : least; }
__device__ inline void told(Partial own, Partial *partials, Part part) {
  own = reduce(own);
  if (threadIdx.x == 0) partials[part.index] = own;
}

struct Adamw { double gradient_scale, a_m, a_g, b_v, b_g, bias1, bias2_sqrt, eps; };

// 'largest_next' is null without amsgrad.
template <class T, class U> __device__ inline void adamw(const T *gradient, const f32 *m, const f32 *v, const f32 *largest, f32 *m_next, f32 *v_next, f32 *largest_next, U *data, u64 count, Adamw s, Partial *partials, Part part) {
  Partial own = {0, 0, 0, 0};
  const float eps = at_least((float)s.eps * (float)s.bias2_sqrt, 1.17549435e-38f);
  const float ratio = (float)s.bias2_sqrt / (float)s.bias1;
  FOR_EACH(i, count) {
    const float g = load(gradient[i]) * (float)s.gradient_scale;
    const float first = number(m, i) * (float)s.a_m + g * (float)s.a_g;
    const float second = number(v, i) * (float)s.b_v + (g * g) * (float)s.b_g;
    m_next[i].bits = first;
    v_next[i].bits = second;
    own.check += second;
    const float most = largest_next ? at_least(second, number(largest, i)) : second;
    if (largest_next) largest_next[i].bits = most;
    store(data[i], first * ratio / (sqrtf(most) + eps));
  }
  told(own, partials, part);
}

struct Rmsprop { double gradient_scale, b_v, b_g, c_m, c_g, eps; };

template <class T, class U> __device__ inline void rmsprop(const T *gradient, const f32 *v, const f32 *buffer, f32 *v_next, f32 *next, U *data, u64 count, Rmsprop s, Partial *partials, Part part) {
  Partial own = {0, 0, 0, 0};
  const float eps = at_least((float)s.eps, 1.17549435e-38f);
  FOR_EACH(i, count) {
    const float g = load(gradient[i]) * (float)s.gradient_scale;
    const float second = number(v, i) * (float)s.b_v + (g * g) * (float)s.b_g;
    const float step = g / (sqrtf(second) + eps);
    const float moved = number(buffer, i) * (float)s.c_m + step * (float)s.c_g;
    v_next[i].bits = second;
    next[i].bits = moved;
    own.check += second;
    own.check += fabs((double)moved);
    store(data[i], moved);
  }
  told(own, partials, part);
}

template <class T, class U> __device__ inline void sgd(const T *gradient, const f32 *buffer, f32 *next, U *data, u64 count, Momentum s, Partial *partials, Part part) {
  Partial own = {0, 0, 0, 0};
  FOR_EACH(i, count) {
    const float g = scaled(gradient[i], s);
    next[i].bits = next_buffer(g, number(buffer, i), s);
    const float u = direction(g, next[i].bits, s);
    own.check += fabs((double)u);
    store(data[i], u);
  }
  told(own, partials, part);
}
