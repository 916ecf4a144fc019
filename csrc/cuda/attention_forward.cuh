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
      load_rows(problem, 8 * NT, kt * 8 * NT, problem.nk,
                rows_of(to.first, problem.d, [&](auto at) { return problem.k(at); }),
                rows_of(to.second, problem.dv, [&](auto at) { return problem.v(at); }));
      copy_commit();
    };
    const int keys = problem.last_key(q0 + rows), key_tiles = (keys + 8 * NT - 1) / (8 * NT);
    if (key_tiles) {
      load_rows(problem, rows, q0, problem.nq, rows_of(q, problem.d, [&](auto at) { return problem.q(head, at); }));
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
      float high[2] = {-infinity(), -infinity()};
      const ScoreTile<false, Problem> scores(problem, head, q0 + row0, k0, 16 * pairs, memory.row_norms() + row0,
                                             memory.column_norms(kt & 1), lane);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n / 2 >= pairs) continue;
        scores.normalize(s[n], n);
        scores.finish(s[n], n);
#pragma unroll
        for (int e = 0; e < 4; ++e) high[e >> 1] = fmaxf(high[e >> 1], s[n][e]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        high[half] = fmaxf(top[half], row_max(high[half]));
        const float base = high[half] == -infinity() ? 0.0f : high[half],
                    shrink = exp2_fast((top[half] - base) * scores.unit);
        total[half] *= shrink;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (n / 2 >= pairs) continue;
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[n][e] = exp2_fast((s[n][e] - base) * scores.unit);
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
        total[half] = row_sum(total[half]);
        const float inverse = total[half] > 0.0f ? reciprocal(total[half]) : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= inverse, out[n][2 * half + 1] *= inverse;
      }
      // Of the four lanes that share two rows, two write a row's log-sum-exp each. NaN stays NaN.
      const int i = q0 + row0 + g + 8 * t;
      if (t < 2 && i < problem.nq) {
        const float sum = t ? total[1] : total[0];
        *problem.lse(head, i) =
            sum == 0.0f ? -infinity() : (t ? top[1] : top[0]) * problem.natural() + log2f(sum) * kLn2;
      }
      store_rows(q, row0, out, problem.dv, lane,
                 [&](int row) { return q0 + row < problem.nq ? problem.out(head, problem.at(q0 + row)) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
}

}  // namespace pyvit::cuda
