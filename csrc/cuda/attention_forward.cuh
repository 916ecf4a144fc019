// Forward with an online softmax (Milakov and Gimelshein, 2018; Dao, "FlashAttention-2", 2023).
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256) attention_forward(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, blockIdx.y);
  const Layout<T, D, NT> memory{rows, 1, problem.most_keys() > 8 * NT ? 2 : 1};
  problem.use(memory.rest());
  const int tiles = (problem.most_queries() + rows - 1) / rows, q0 = int(blockIdx.x % tiles) * rows;
  const Range range = range_of(problem.count(), blockIdx.x / tiles, gridDim.x / tiles);
  const Tile<T, D> q = memory.own(0);
  const int head = problem.head;
  for (int index = range.first; index < range.last; ++index) {
    problem.begin(index);
    if (q0 >= problem.nq) continue;
    const auto load_keys = [&](int kt) {
      const Stage<T, D> to = memory.stage(kt & 1);
      load_rows(to.first, 8 * NT, kt * 8 * NT, problem.nk, problem.d, problem.any(),
                [&](int j) { return problem.k(j); });
      load_rows(to.second, 8 * NT, kt * 8 * NT, problem.nk, problem.dv, problem.any(),
                [&](int j) { return problem.v(j); });
      copy_commit();
    };
    const int keys = problem.last_key(q0 + rows), key_tiles = (keys + 8 * NT - 1) / (8 * NT);
    if (key_tiles) {
      load_rows(q, rows, q0, problem.nq, problem.d, problem.any(), [&](int i) { return problem.q(head, i); });
      load_keys(0);
    }
    float out[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};
    for (int kt = 0; kt < key_tiles; ++kt) {
      copy_wait<0>();
      PYVIT_BARRIER();
      if (kt + 1 < key_tiles) load_keys(kt + 1);
      const Stage<T, D> stage = memory.stage(kt & 1);
      if (problem.cosine()) {
        if (kt == 0) inverse_norms(q, rows, memory.row_norms());
        inverse_norms(stage.first, 8 * NT, memory.column_norms(kt & 1));
        PYVIT_BARRIER();
      }
      if (q0 + row0 >= problem.nq) continue;
      const int k0 = kt * 8 * NT, pairs = pairs_of(keys - k0, 8 * NT);
      float s[NT][4];
      multiply_rows<T, D, NT>(s, q, row0, stage.first, pairs, lane);
      float high[2] = {top[0], top[1]};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = row0 + g + (e >> 1) * 8, column = n * 8 + 2 * t + (e & 1);
          const float factor = problem.cosine() ? memory.row_norms()[row] * memory.column_norms(kt & 1)[column] : 1.0f;
          s[n][e] = problem.score(s[n][e] * problem.scale_log2 * factor, head, q0 + row, k0 + column);
          high[e >> 1] = fmaxf(high[e >> 1], s[n][e]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        high[half] = row_max(high[half]);
        const float base = high[half] == -infinity() ? 0.0f : high[half], shrink = exp2_fast(top[half] - base);
        total[half] *= shrink;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[n][e] = exp2_fast(s[n][e] - base);
            total[half] += s[n][e];
          }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= shrink, out[n][2 * half + 1] *= shrink;
        top[half] = high[half];
      }
      accumulate_rows<T, D, NT>(out, s, stage.second, pairs, lane);
    }
    if (q0 + row0 < problem.nq) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_sum(total[half]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= inverse, out[n][2 * half + 1] *= inverse;
        const int i = q0 + row0 + g + 8 * half;
        if (t == 0 && i < problem.nq)
          *problem.lse(head, i) = sum == 0.0f ? -infinity() : (top[half] + log2f(sum)) * kLn2;  // NaN stays
      }
      store_rows(q, row0, out, problem.dv, lane,
                 [&](int row) { return q0 + row < problem.nq ? problem.out(head, q0 + row) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
}

}  // namespace pyvit::cuda
