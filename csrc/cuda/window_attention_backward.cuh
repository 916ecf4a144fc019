// All gradients of a window by one block, which reads and writes every tensor once and makes five products: scores,
// their gradient, dQ, and, with probabilities and score gradients exchanged through shared memory, dV and dK.
#pragma once

#include "window_attention.cuh"

namespace pyvit::cuda {

// Shared memory: one or two stages of q, k, v and grad_out, two (rows x columns) matrices of the element type, the
// inverse norms of q and k, and what Windows keeps.
template <class T, int D, int COLUMNS>
struct WindowLayout {
  using Matrix = Tile<T, COLUMNS>;
  static constexpr int kTwoStages = 54 << 10;  // the most that three blocks of an sm_80 processor may each have
  int rows, stages;

  __host__ __device__ WindowLayout(int rows_, const Window& w) : rows(rows_), stages(2) {
    if (bytes(w) > kTwoStages) stages = 1;
  }
  PYVIT_DEVICE Tile<T, D> tile(int stage, int which) const {
    return {reinterpret_cast<T*>(shared_memory() + (4 * stage + which) * Tile<T, D>::bytes(rows))};
  }
  PYVIT_DEVICE Matrix matrix(int which) const {
    return {reinterpret_cast<T*>(shared_memory() + 4 * stages * Tile<T, D>::bytes(rows) + which * Matrix::bytes(rows))};
  }
  PYVIT_DEVICE float* norms(int which) const {
    return reinterpret_cast<float*>(shared_memory() + tile_bytes()) + which * rows;
  }
  PYVIT_DEVICE char* rest() const { return reinterpret_cast<char*>(norms(2)); }
  __host__ __device__ int tile_bytes() const { return 4 * stages * Tile<T, D>::bytes(rows) + 2 * Matrix::bytes(rows); }
  __host__ __device__ int bytes(const Window& w) const {
    return tile_bytes() + 2 * rows * 4 + Windows<T>::scratch_bytes(w, 2);
  }
};

// sums[16 x D] += weights[0 ... count, column0 ...]^T rows.
template <class T, int D, int COLUMNS>
PYVIT_DEVICE void accumulate_columns(float (&sums)[D / 8][4], Tile<T, COLUMNS> weights, int column0, Tile<T, D> rows,
                                     int count, int lane) {
  Fragments<T> f;
  const auto from_a = f.place_a_transposed(weights, column0, lane);
  typename Fragments<T>::template Place<D> from_b[D / 16];
#pragma unroll
  for (int d = 0; d < D / 16; ++d) from_b[d] = f.place_b_transposed(rows, d * 16, lane);
  for (int k = 0; k < count; k += f.kK) {
    f.load_a_transposed(from_a, k);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      f.load_b_transposed(from_b[d], k);
      f.multiply(sums[2 * d], sums[2 * d + 1]);
    }
  }
}

// Two neighbours of a row, rounded to the element type.
template <class T, int COLUMNS>
PYVIT_DEVICE void store_pair(Tile<T, COLUMNS> matrix, int row, int column, float left, float right) {
  T* to = matrix.at(row, column);
  if constexpr (sizeof(T) == 2)
    *reinterpret_cast<uint32_t*>(to) = pack(T{}, left, right);
  else
    to[0] = left, to[1] = right;
}

// What RowSum finds of a warp's rows.
struct RowShifts {
  float shift[2], rest[2];
};

// A call, and everything by value: in line, this rare branch would take registers from what it interrupts.
template <class T, int D>
PYVIT_DEVICE_CALL RowShifts sum_rows_again(Windows<T> problem, Tile<T, D> q, int row0, Tile<T, D> k,
                                           const float* q_norms, const float* k_norms, int lane, RowShifts found) {
  RowSum sums;
#pragma unroll 1
  for (int k0 = 0; k0 < problem.nk; k0 += 16) {
    float s[2][4];
    multiply_rows<T, D, 2>(s, q, row0, k.from(k0), 1, lane);
    const ScoreTile<false, Windows<T>> scores(problem, problem.head, row0, k0, 16, q_norms + row0, k_norms + k0, lane);
    sums.add(s, scores, 1);
  }
  sums.finish(found.shift, found.rest);
  return found;
}

// Whether it is true of any lane.
PYVIT_DEVICE bool warp_any(bool x) {
#ifdef __CUDA_ARCH__
  return __any_sync(0xFFFFFFFFu, x);
#else
  return warp_sum(x ? 1.0f : 0.0f) > 0.0f;
#endif
}

// Windows of up to 8 NT TILES tokens. A warp owns 16 queries, then 16 keys; a block goes through its chunk's windows of
// one head, with the sums of the table's gradient in registers. While TILES is 1 a warp holds whole rows of scores, and
// takes delta, what the softmax's gradient subtracts, from them; otherwise from the output.
template <class T, int D, int NT, int TILES>
__global__ void __launch_bounds__(16 * NT * TILES, TILES == 1 && sizeof(T) == 2 ? 3 : 1)
    window_backward(const __grid_constant__ WindowGradient params) {
  const int lane = lane_of(threadIdx.x), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp_of(threadIdx.x) * 16;
  Windows<T> problem(params, blockIdx.y);
  const WindowLayout<T, D, 8 * NT * TILES> memory(rows, params.forward);
  const int stages = memory.stages;
  problem.use(memory.rest(), 2);
  const int head = problem.head, n = problem.nq;
  const bool cosine = problem.cosine();
  const Range range = range_of(problem.count(), blockIdx.x, gridDim.x);
  // Of the window whose tokens were found last.
  const auto load = [&](int buffer, int stage) {
    Windows<T> window = problem;
    window.take(buffer);
    load_rows(window, rows, 0, n,
              rows_of(memory.tile(stage, 0), problem.d, [&](auto at) { return window.q(head, at); }),
              rows_of(memory.tile(stage, 1), problem.d, [&](auto at) { return window.k(at); }),
              rows_of(memory.tile(stage, 2), problem.d, [&](auto at) { return window.v(at); }),
              rows_of(memory.tile(stage, 3), problem.d, [&](auto at) { return window.grad_out(head, at); }));
    copy_commit();
  };
  const auto p_matrix = memory.matrix(0), ds_matrix = memory.matrix(1);
  const float *q_norms = memory.norms(0), *k_norms = memory.norms(1);
  float table_sums[TILES][NT][4] = {}, logit_sum = 0.0f;
  if (range.first < range.last) {
    problem.find(range.first, 0);
    PYVIT_BARRIER();
    load(0, 0);
  }
  for (int index = range.first; index < range.last; ++index) {
    const int buffer = (index - range.first) & 1, stage = stages == 2 ? buffer : 0;
    const bool more = index + 1 < range.last;
    const Tile<T, D> q = memory.tile(stage, 0), k = memory.tile(stage, 1), v = memory.tile(stage, 2),
                     grad_out = memory.tile(stage, 3);
    copy_wait<0>();
    PYVIT_BARRIER();
    problem.take(buffer);
    if (more) problem.find(index + 1, buffer ^ 1);
    if (cosine) {
      inverse_norms(q, rows, memory.norms(0));
      inverse_norms(k, rows, memory.norms(1));
    }
    PYVIT_BARRIER();
    if (stages == 2 && more) load(buffer ^ 1, stage ^ 1);

    float dq[D / 8][4] = {}, delta[2];
    RowShifts found = {};
    float means[2][3] = {};  // of dP, scores and their product
    bool again = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row0 + g + 8 * half;
      const float lse = i < n ? *problem.lse(head, i) : -infinity();
      found.shift[half] = backward_shift(problem, lse);
      again |= large(lse);
      if constexpr (TILES > 1) delta[half] = row_sum(delta_part(problem, grad_out, row0 + g + 8 * half, i, t));
    }
    if (warp_any(again)) found = sum_rows_again<T, D>(problem, q, row0, k, q_norms, k_norms, lane, found);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int k0 = tile * 8 * NT, pairs = pairs_of(n - k0, 8 * NT);
      float s[NT][4], dp[NT][4];
      multiply_rows<T, D, NT>(s, q, row0, k.from(k0), pairs, lane);
      multiply_rows<T, D, NT>(dp, grad_out, row0, v.from(k0), pairs, lane);
      const ScoreTile<false, Windows<T>> scores(problem, head, row0, k0, 16 * pairs, q_norms + row0, k_norms + k0,
                                                lane);
#pragma unroll
      for (int m = 0; m < NT; ++m) {
        if (m / 2 >= pairs) continue;
        scores.normalize(s[m], m);
        float p[4] = {s[m][0], s[m][1], s[m][2], s[m][3]};
        scores.finish(p, m);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          p[e] = probability(p[e], found.shift[e >> 1], found.rest[e >> 1], scores.unit);
          means[e >> 1][0] += p[e] * dp[m][e];
        }
        if (cosine) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            means[e >> 1][1] += p[e] * s[m][e];
            means[e >> 1][2] += p[e] * dp[m][e] * s[m][e];
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][e] = p[e];
      }
      if constexpr (TILES == 1) delta[0] = row_sum(means[0][0]), delta[1] = row_sum(means[1][0]);
#pragma unroll
      for (int m = 0; m < NT; ++m) {
        if (m / 2 >= pairs) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + g + half * 8, column = k0 + m * 8 + 2 * t;
          float weights[2];
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            const int e = 2 * half + side;
            weights[side] = dp[m][e] = s[m][e] * (dp[m][e] - delta[half]);
            table_sums[tile][m][e] += dp[m][e];
          }
          if (cosine) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              weights[side] = operand<T>(weights[side] * q_norms[row]);
              dp[m][2 * half + side] = operand<T>(dp[m][2 * half + side] * k_norms[column + side]);
            }
          }
          store_pair(p_matrix, row, column, s[m][2 * half], s[m][2 * half + 1]);
          store_pair(ds_matrix, row, column, weights[0], weights[1]);
        }
      }
      accumulate_rows<T, D, NT>(dq, dp, k.from(k0), pairs, lane);
    }
    PYVIT_BARRIER();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + g + 8 * half;
      const float norm = cosine ? q_norms[row] : 1.0f;
      float along = 0.0f;  // the sum of ds times score, as a covariance: free of delta's rounding
      if (cosine) along = (row_sum(means[half][2]) - row_sum(means[half][0]) * row_sum(means[half][1])) * problem.scale;
      if (t == 0) logit_sum += along;
#pragma unroll
      for (int m = 0; m < D / 8; ++m) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          dq[m][e] *= problem.scale * norm;
          if (cosine) dq[m][e] -= widen(*q.at(row, m * 8 + 2 * t + (e & 1))) * norm * norm * along;
        }
      }
    }
    // From here on each warp's rows of v and k are its own; those of q and grad_out are still read by all.
    store_rows(v, row0, dq, problem.d, lane,
               [&](int i) { return i < n ? problem.grad_q(head, problem.at(i)) : nullptr; });

    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    accumulate_columns<T, D>(dv, p_matrix, row0, grad_out, rows, lane);
    accumulate_columns<T, D>(dk, ds_matrix, row0, q, rows, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + g + 8 * half;
      const float norm = cosine ? k_norms[row] : 1.0f;
      float along = 0.0f;
      if (cosine) {  // dK is orthogonal to k: its part along k goes
#pragma unroll
        for (int m = 0; m < D / 8; ++m)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) along += dk[m][e] * widen(*k.at(row, m * 8 + 2 * t + (e & 1)));
        along = row_sum(along) * norm * norm;
      }
      float* pad = row < n ? problem.pad_row(row) : nullptr;
#pragma unroll
      for (int m = 0; m < D / 8; ++m) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const int column = m * 8 + 2 * t + (e & 1);
          if (cosine) dk[m][e] -= along * widen(*k.at(row, column));
          dk[m][e] *= problem.scale * norm;
          if (pad && column < problem.d) problem.store_pad(pad, column, dk[m][e], dv[m][e]);
        }
      }
    }
    warp_barrier();
    store_rows(k, row0, dk, problem.d, lane, [&](int j) { return j < n ? problem.grad_k(problem.at(j)) : nullptr; });
    store_rows(v, row0, dv, problem.d, lane, [&](int j) { return j < n ? problem.grad_v(problem.at(j)) : nullptr; });
    if (stages == 1 && more) {
      PYVIT_BARRIER();
      load(buffer ^ 1, 0);
    }
  }

  if (params.grad_bias_table) {
    float* partial = problem.bias_partials() + (int64_t(blockIdx.x) * problem.heads() + head) * n * n;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int m = 0; m < NT; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row0 + g + (e >> 1) * 8, j = (tile * NT + m) * 8 + 2 * t + (e & 1);
          if (i < n && j < n) partial[i * n + j] = table_sums[tile][m][e];
        }
      }
    }
  }
  if (cosine) store_logit_sum(problem, logit_sum, memory.norms(0));
}

}  // namespace pyvit::cuda
