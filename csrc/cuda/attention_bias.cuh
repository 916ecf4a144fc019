// Gradient of a bias, whatever it broadcasts over.
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

// Which parts of (problem, head, query tile, key tile) a block of the bias kernel owns, and which it sums over, in this
// order.
struct BiasItem {
  int at[4];
};
PYVIT_DEVICE BiasItem bias_item(const int (&extent)[4], const bool (&broadcast)[4], int owned, int64_t summed) {
  BiasItem item;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (broadcast[i]) {
      item.at[i] = int(summed % extent[i]);
      summed /= extent[i];
    } else {
      item.at[i] = owned % extent[i];
      owned /= extent[i];
    }
  }
  return item;
}

// dBias: a block owns a tile (or, where the bias broadcasts, a row, a column or one element) of one chunk's partial
// sums.
template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256)
    attention_backward_bias(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, 0);
  const Layout<T, D, NT> memory{rows, 2, 1};
  problem.use(memory.rest());
  const bool (&broadcast)[4] = problem.bias_broadcast();
  const int extent[4] = {int(problem.count()), problem.heads(), (problem.most_queries() + rows - 1) / rows,
                         (problem.most_keys() + 8 * NT - 1) / (8 * NT)};
  int64_t summed = 1;
  int owned = 1;
#pragma unroll
  for (int i = 0; i < 4; ++i) (broadcast[i] ? summed *= extent[i] : owned *= extent[i]);
  const int chunks = gridDim.x / owned, chunk = blockIdx.x / owned, block = blockIdx.x % owned;
  const Tile<T, D> q = memory.own(0), grad_out = memory.own(1);
  const Stage<T, D> stage = memory.stage(0);
  float sums[NT][4] = {};
  for (int64_t i = summed * chunk / chunks; i < summed * (chunk + 1) / chunks; ++i) {
    const BiasItem item = bias_item(extent, broadcast, block, i);
    const int head = item.at[1], q0 = item.at[2] * rows, k0 = item.at[3] * 8 * NT;
    PYVIT_BARRIER();
    problem.set_head(head);
    problem.begin(item.at[0]);
    if (q0 >= problem.nq || k0 >= problem.last_key(q0 + rows)) continue;
    load_rows(problem, rows, q0, problem.nq, rows_of(q, problem.d, [&](auto at) { return problem.q(head, at); }),
              rows_of(grad_out, problem.dv, [&](auto at) { return problem.grad_out(head, at); }));
    load_rows(problem, 8 * NT, k0, problem.nk, rows_of(stage.first, problem.d, [&](auto at) { return problem.k(at); }),
              rows_of(stage.second, problem.dv, [&](auto at) { return problem.v(at); }));
    copy_commit();
    copy_wait<0>();
    PYVIT_BARRIER();
    if (problem.cosine()) {
      inverse_norms(q, rows, memory.row_norms());
      inverse_norms(stage.first, 8 * NT, memory.column_norms(0));
      PYVIT_BARRIER();
    }
    if (q0 + row0 >= problem.nq) continue;
    const int pairs = pairs_of(problem.nk - k0, 8 * NT);
    float s[NT][4], dp[NT][4];
    multiply_rows<T, D, NT>(s, q, row0, stage.first, pairs, lane);
    multiply_rows<T, D, NT>(dp, grad_out, row0, stage.second, pairs, lane);
    const ScoreTile<false, Problem> scores(problem, head, q0 + row0, k0, 16 * pairs, memory.row_norms() + row0,
                                           memory.column_norms(0), lane);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      if (n / 2 >= pairs) continue;
      scores.normalize(s[n], n);
      scores.finish(s[n], n);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = q0 + row0 + g + 8 * half;
      const bool real = r < problem.nq;
      const float shift = real ? *problem.shift(head, r) : infinity(), rest = real ? *problem.rest(head, r) : 0.0f,
                  delta = real ? problem.delta(head, r) : 0.0f;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n / 2 >= pairs) continue;
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e)
          sums[n][e] += probability(s[n][e], shift, rest, scores.unit) * (dp[n][e] - delta);
      }
    }
  }
  if (broadcast[3]) {  // one column: the sum lands in element 0 of each row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < NT; ++n) sum += sums[n][2 * half] + sums[n][2 * half + 1];
      sums[0][2 * half] = row_sum(sum);
    }
  }
  const BiasItem item = bias_item(extent, broadcast, block, 0);
  const int columns = broadcast[3] ? 1 : problem.most_keys(), lines = broadcast[2] ? 1 : problem.most_queries();
  const int q0 = item.at[2] * rows, k0 = item.at[3] * 8 * NT;
  const int64_t plane = (int64_t(chunk) * (broadcast[0] ? 1 : extent[0]) + (broadcast[0] ? 0 : item.at[0])) *
                            (broadcast[1] ? 1 : extent[1]) +
                        (broadcast[1] ? 0 : item.at[1]);
  float* partial = problem.bias_partials() + plane * lines * columns;
  if (broadcast[2]) {  // one row: over the rows of a warp, then over warps in order
    float* exchange = reinterpret_cast<float*>(shared_memory());
    PYVIT_BARRIER();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = sums[n][e] + sums[n][e + 2];
        sum += shuffle_xor(sum, 4);
        sum += shuffle_xor(sum, 8);
        sum += shuffle_xor(sum, 16);
        if (g == 0) exchange[warp * 8 * NT + n * 8 + 2 * t + e] = sum;
      }
    }
    PYVIT_BARRIER();
    const int count = broadcast[3] ? 1 : 8 * NT;
    for (int c = thread; c < count; c += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += exchange[w * 8 * NT + c];
      if (k0 + c < columns || broadcast[3]) partial[broadcast[3] ? 0 : k0 + c] = sum;
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = q0 + row0 + g + (e >> 1) * 8, j = k0 + n * 8 + 2 * t + (e & 1);
      if (i >= lines) continue;
      if (broadcast[3]) {
        if (n == 0 && t == 0 && (e & 1) == 0) partial[i] = sums[n][e];
      } else if (j < columns) {
        partial[int64_t(i) * columns + j] = sums[n][e];
      }
    }
  }
}

}  // namespace pyvit::cuda
