__device__ inline Partial total(const Partial *partials, u64 count) {
  Partial sum = {0, 0, 0, 0};
  for (u64 i = threadIdx.x; i < count; i += blockDim.x) add(sum, partials[i].print, partials[i].squares, partials[i].check, 0);
  return reduce(sum);
}

struct Result { u64 gradient_print, update_print; double gradient_squares, update_squares, check; };

// One block sums what the others found into memory that the host reads. Where 'gradient' is null the partial sums of
// 'momentum', the checks, have the gradient's scan.
__device__ inline void collect(const Partial *gradient, u64 gradient_blocks, u64 gradient_bytes, const Partial *update, u64 update_blocks, u64 update_bytes, const Partial *checks, u64 check_blocks, volatile Result *result, Part) {
  const Partial u = total(update, update_blocks), c = total(checks, check_blocks);
  Partial g = {c.print, c.check, 0, 0};
  if (gradient) g = total(gradient, gradient_blocks);
  if (threadIdx.x != 0) return;
  result->gradient_print = g.print + mix(gradient_bytes);
  result->gradient_squares = g.squares;
  result->update_print = u.print + mix(update_bytes);
  result->update_squares = u.squares;
  result->check = gradient ? c.check : c.squares;
}
