// Gradients of queries, and of keys and values: two kernels, each the owner of the rows that it writes. The first also
// writes delta, what the softmax's gradient subtracts, and each row's shift and rest, for the second and for that of a
// bias.
#pragma once

#include "attention.cuh"

namespace pyvit::cuda {

// Beside two matrices of scores and their sums floats leave no registers for addresses.
template <class T, int D>
constexpr bool kKeepAddresses = sizeof(T) == 2 && D <= 80;

// With SUMS (windows, whose bias is one for all) the scores' gradients are also summed over the block's problems, in
// shared memory behind what the problem keeps: four floats of a thread lie together, so that each has its own.
template <class Problem, int D, int NT, bool SUMS>
__global__ void __launch_bounds__(256, 1)
    attention_backward_queries(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int lane = lane_of(threadIdx.x), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp_of(threadIdx.x) * 16;
  Problem problem(params, blockIdx.y);
  const Layout<T, D, NT> memory{rows, 2, problem.most_keys() > 8 * NT ? 2 : 1};
  problem.use(memory.rest());
  const int tiles = (problem.most_queries() + rows - 1) / rows, q0 = int(blockIdx.x % tiles) * rows;
  const int groups = gridDim.x / tiles, group = blockIdx.x / tiles;
  const Range range = range_of(problem.count(), group, groups);
  const Tile<T, D> q = memory.own(0), grad_out = memory.own(1);
  const int head = problem.head;
  float logit_sum = 0.0f;
  [[maybe_unused]] const auto sums_of = [&](int tile) {
    char* sums = memory.rest();
    if constexpr (SUMS) sums += Problem::scratch_bytes(params.forward);
    return reinterpret_cast<Floats4*>(sums) + int64_t(tile) * blockDim.x + threadIdx.x;
  };
  if constexpr (SUMS)
    for (int i = 0; i < (problem.most_keys() + 7) / 8; ++i) *sums_of(i) = {};
  for (int index = range.first; index < range.last; ++index) {
    problem.begin(index);
    if (q0 >= problem.nq) continue;
    const int keys = problem.last_key(q0 + rows), key_tiles = (keys + 8 * NT - 1) / (8 * NT);
    const auto load_keys = [&](int kt) {
      const Stage<T, D> to = memory.stage(kt & 1);
      load_rows(problem, 8 * NT, kt * 8 * NT, problem.nk,
                rows_of(to.first, problem.d, [&](auto at) { return problem.k(at); }),
                rows_of(to.second, problem.dv, [&](auto at) { return problem.v(at); }));
      copy_commit();
    };
    if (key_tiles) {
      load_rows(problem, rows, q0, problem.nq, rows_of(q, problem.d, [&](auto at) { return problem.q(head, at); }),
                rows_of(grad_out, problem.dv, [&](auto at) { return problem.grad_out(head, at); }));
      load_keys(0);
    }
    // Waits for a tile of keys, has the next one loaded, and finds the norms.
    const auto take_keys = [&](int kt) {
      copy_wait<0>();
      PYVIT_BARRIER();
      if (kt + 1 < key_tiles) load_keys(kt + 1);
      if (problem.cosine()) {
        if (kt == 0) inverse_norms(q, rows, memory.row_norms());
        inverse_norms(memory.stage(kt & 1).first, 8 * NT, memory.column_norms(kt & 1));
        PYVIT_BARRIER();
      }
    };
    // A warp's products of queries and keys.
    const auto multiply_keys = [&](float (&s)[NT][4], int kt) {
      const int k0 = kt * 8 * NT, pairs = pairs_of(keys - k0, 8 * NT);
      multiply_rows<T, D, NT>(s, q, row0, memory.stage(kt & 1).first, pairs, lane);
      return ScoreTile<false, Problem>(problem, head, q0 + row0, k0, 16 * pairs, memory.row_norms() + row0,
                                       memory.column_norms(kt & 1), lane);
    };
    float shift[2], rest[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = q0 + row0 + g + 8 * half;
      shift[half] = i < problem.nq ? backward_shift(problem, *problem.lse(head, i)) : infinity();
    }
    // Where the block has a row whose log-sum-exp is large, its rows are summed again before their gradients are made.
    bool again = false;
    for (int i = lane; i < rows; i += 32) again |= q0 + i < problem.nq && large(*problem.lse(head, q0 + i));
    if (warp_sum(again ? 1.0f : 0.0f) > 0.0f) {
      RowSum sums;
      for (int kt = 0; kt < key_tiles; ++kt) {
        take_keys(kt);
        if (q0 + row0 >= problem.nq) continue;
        float s[NT][4];
        const auto scores = multiply_keys(s, kt);
        sums.add(s, scores, pairs_of(keys - kt * 8 * NT, 8 * NT));
      }
      sums.finish(shift, rest);
      if (key_tiles > 1) {
        PYVIT_BARRIER();
        load_keys(0);
      }
    }
    float delta[2] = {0.0f, 0.0f}, dq[D / 8][4] = {}, dots[2] = {0.0f, 0.0f}, slip[2] = {0.0f, 0.0f},
          mean[2] = {0.0f, 0.0f};
    for (int kt = 0; kt < key_tiles; ++kt) {
      take_keys(kt);
      if (q0 + row0 >= problem.nq) continue;
      const int k0 = kt * 8 * NT, pairs = pairs_of(keys - k0, 8 * NT);
      const Stage<T, D> stage = memory.stage(kt & 1);
      const float* key_norms = memory.column_norms(kt & 1);
      float s[NT][4];
      const auto scores = multiply_keys(s, kt);
      if (kt == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + g + 8 * half, i = q0 + row;
          delta[half] = row_sum(delta_part(problem, grad_out, row, i, t));
          if (i < problem.nq) delta[half] -= problem.grad_lse(head, i);
          if (i >= problem.nq || t != 0) continue;
          if (float* kept = problem.delta_at(head, i)) *kept = delta[half];
          *problem.shift(head, i) = shift[half], *problem.rest(head, i) = rest[half];
        }
      }
      float dp[NT][4];
      multiply_rows<T, D, NT>(dp, grad_out, row0, stage.second, pairs, lane);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n / 2 >= pairs) continue;
        scores.normalize(s[n], n);
        float p[4] = {s[n][0], s[n][1], s[n][2], s[n][3]}, ds[4];
        scores.finish(p, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[e] = probability(p[e], shift[e >> 1], rest[e >> 1], scores.unit);
          ds[e] = p[e] * (dp[n][e] - delta[e >> 1]);
        }
        if constexpr (SUMS) {
          if (k0 + n * 8 < problem.nk) {
            Floats4 sum = *sums_of(kt * NT + n);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum.at[e] += ds[e];
            *sums_of(kt * NT + n) = sum;
          }
        }
        if (problem.cosine()) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            dots[e >> 1] += ds[e] * s[n][e];
            slip[e >> 1] += ds[e];
            mean[e >> 1] += p[e] * s[n][e];
            ds[e] = operand<T>(ds[e] * key_norms[n * 8 + 2 * t + (e & 1)]);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = ds[e];
      }
      accumulate_rows<T, D, NT, kKeepAddresses<T, D>>(dq, s, stage.first, pairs, lane);
    }
    if (q0 + row0 < problem.nq) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + g + 8 * half;
        // A row's ds sum to zero; what they do sum to is delta's rounding, which the scores would multiply.
        const float along = (row_sum(dots[half]) - row_sum(slip[half]) * row_sum(mean[half])) * problem.scale,
                    norm = problem.cosine() ? memory.row_norms()[row] : 1.0f;
        if (t == 0) logit_sum += along;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            dq[n][e] *= problem.scale * norm;
            if (problem.cosine()) dq[n][e] -= widen(*q.at(row, n * 8 + 2 * t + (e & 1))) * norm * norm * along;
          }
        }
      }
      store_rows(q, row0, dq, problem.d, lane,
                 [&](int row) { return q0 + row < problem.nq ? problem.grad_q(head, problem.at(q0 + row)) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
  if (problem.cosine()) store_logit_sum(problem, logit_sum, memory.row_norms());
  if constexpr (SUMS) {
    const int n = problem.nq;
    float* partial = problem.bias_partials() + (int64_t(group) * problem.heads() + head) * n * n;
    for (int tile = 0; tile < (n + 7) / 8; ++tile) {
      const Floats4 sum = *sums_of(tile);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = q0 + row0 + g + (e >> 1) * 8, j = tile * 8 + 2 * t + (e & 1);
        if (i < n && j < n) partial[int64_t(i) * n + j] = sum.at[e];
      }
    }
  }
}

template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256, 1)
    attention_backward_keys(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, blockIdx.y * Problem::queries_per_key_head(params));
  const int passes = Problem::queries_per_key_head(params);
  const Layout<T, D, NT> memory{rows, 2, key_pass_stages<NT>(problem.most_queries(), passes)};
  problem.use(memory.rest());
  const int tiles = (problem.most_keys() + rows - 1) / rows, k0 = int(blockIdx.x % tiles) * rows;
  const Range range = range_of(problem.count(), blockIdx.x / tiles, gridDim.x / tiles);
  const Tile<T, D> k = memory.own(0), v = memory.own(1);
  for (int index = range.first; index < range.last; ++index) {
    problem.begin(index);
    if (k0 >= problem.nk) continue;
    const int first_tile = problem.first_query(k0) / (8 * NT), end_tile = (problem.nq + 8 * NT - 1) / (8 * NT);
    const int per_pass = max(end_tile - first_tile, 0), steps = per_pass * passes;
    const auto load_queries = [&](int step) {
      const int head = problem.head + step / per_pass, q0 = (first_tile + step % per_pass) * 8 * NT;
      const Stage<T, D> to = memory.stage(step & 1);
      load_rows(problem, 8 * NT, q0, problem.nq,
                rows_of(to.first, problem.d, [&](auto at) { return problem.q(head, at); }),
                rows_of(to.second, problem.dv, [&](auto at) { return problem.grad_out(head, at); }));
      copy_commit();
      for (int i = thread; i < 8 * NT; i += blockDim.x) {
        const bool real = q0 + i < problem.nq;
        memory.column_shift(step & 1)[i] = real ? *problem.shift(head, q0 + i) : infinity();
        memory.column_rest(step & 1)[i] = real ? *problem.rest(head, q0 + i) : 0.0f;
        memory.column_delta(step & 1)[i] = real ? problem.delta(head, q0 + i) : 0.0f;
      }
    };
    if (steps) {
      load_rows(problem, rows, k0, problem.nk, rows_of(k, problem.d, [&](auto at) { return problem.k(at); }),
                rows_of(v, problem.dv, [&](auto at) { return problem.v(at); }));
      load_queries(0);
    }
    float dk[D / 8][4] = {}, dv[D / 8][4] = {}, dots[2] = {0.0f, 0.0f};
    for (int step = 0; step < steps; ++step) {
      copy_wait<0>();
      PYVIT_BARRIER();
      if (step + 1 < steps) load_queries(step + 1);
      const Stage<T, D> stage = memory.stage(step & 1);
      if (problem.cosine()) {
        if (step == 0) inverse_norms(k, rows, memory.row_norms());
        inverse_norms(stage.first, 8 * NT, memory.column_norms(step & 1));
        PYVIT_BARRIER();
      }
      if (k0 + row0 >= problem.nk) continue;
      const int head = problem.head + step / per_pass, q0 = (first_tile + step % per_pass) * 8 * NT,
                pairs = pairs_of(problem.nq - q0, 8 * NT);
      const float *shift = memory.column_shift(step & 1), *rest = memory.column_rest(step & 1),
                  *delta = memory.column_delta(step & 1);
      float s[NT][4], dp[NT][4];
      multiply_rows<T, D, NT>(s, k, row0, stage.first, pairs, lane);
      multiply_rows<T, D, NT>(dp, v, row0, stage.second, pairs, lane);
      const float* query_norms = memory.column_norms(step & 1);
      const ScoreTile<true, Problem> scores(problem, head, k0 + row0, q0, 16 * pairs, memory.row_norms() + row0,
                                            query_norms, lane);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n / 2 >= pairs) continue;
        scores.normalize(s[n], n);
        float p[4] = {s[n][0], s[n][1], s[n][2], s[n][3]};
        scores.finish(p, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = n * 8 + 2 * t + (e & 1);
          p[e] = probability(p[e], shift[column], rest[column], scores.unit);
          dp[n][e] = p[e] * (dp[n][e] - delta[column]);
        }
        if (problem.cosine()) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            dots[e >> 1] += dp[n][e] * s[n][e];
            dp[n][e] = operand<T>(dp[n][e] * query_norms[n * 8 + 2 * t + (e & 1)]);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = p[e];
      }
      accumulate_rows<T, D, NT, kKeepAddresses<T, D>>(dv, s, stage.second, pairs, lane);
      accumulate_rows<T, D, NT, kKeepAddresses<T, D>>(dk, dp, stage.first, pairs, lane);
    }
    if (k0 + row0 < problem.nk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + g + 8 * half;
        const float along = row_sum(dots[half]) * problem.scale,
                    norm = problem.cosine() ? memory.row_norms()[row] : 1.0f;
        float* pad = k0 + row < problem.nk ? problem.pad_row(k0 + row) : nullptr;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const int column = n * 8 + 2 * t + (e & 1);
            dk[n][e] *= problem.scale * norm;
            if (problem.cosine()) dk[n][e] -= widen(*k.at(row, column)) * norm * norm * along;
            if (pad && column < problem.d) problem.store_pad(pad, column, dk[n][e], dv[n][e]);
          }
        }
      }
      store_rows(k, row0, dk, problem.d, lane,
                 [&](int row) { return k0 + row < problem.nk ? problem.grad_k(problem.at(k0 + row)) : nullptr; });
      store_rows(v, row0, dv, problem.dv, lane,
                 [&](int row) { return k0 + row < problem.nk ? problem.grad_v(problem.at(k0 + row)) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
}

}  // namespace pyvit::cuda
