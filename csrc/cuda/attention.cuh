// Attention on 16-row warps, shared by dense, packed and window attention, which differ only in where rows lie and how a score is made
// from a product (a Problem, see flash_attention.cuh and window_attention.cuh).
//
// Forward: a block owns 16 query rows per warp and streams key tiles with an online softmax. Backward recomputes the probabilities from
// the log-sum-exp: one kernel owns query rows (dQ), one owns key rows (dK, dV, on transposed scores so that P^T is an operand as it
// stands), one owns tiles of the bias and sums over everything the bias broadcasts over. Every result has one owner: no atomics.
#pragma once

#include "kernel_launch.cuh"

namespace pyvit::cuda {

// 8-column tiles that a streamed tile holds, as many as the accumulators leave registers for.
template <class T, int D>
constexpr int kForwardColumns = sizeof(T) == 2 ? 8 : 4;
template <class T, int D>
constexpr int kBackwardColumns = sizeof(T) == 2 && D <= 64 ? 8 : 4;

// rows x D elements to shared memory; rows at `limit` and beyond, rows without a source and channels beyond `width` become zeros.
template <class T, int D, class Source>
PYVIT_DEVICE void load_rows(Tile<T, D> tile, int rows, int first, int limit, int width, const void* any, Source source) {
  using Rows = Tile<T, D>;
  for (int c = threadIdx.x; c < rows * Rows::kChunks; c += blockDim.x) {
    const int row = c / Rows::kChunks, chunk = c % Rows::kChunks;
    const T* from = first + row < limit && chunk * Rows::kPerChunk < width ? source(first + row) : nullptr;
    copy_async(tile.chunk(row, chunk), from ? from + chunk * Rows::kPerChunk : any, from ? 16 : 0);
  }
}

// scores[16 x 8 NT] = a[row0 ...] b[0 ...]^T, over the first `pairs` pairs of column tiles.
template <class T, int D, int NT>
PYVIT_DEVICE void multiply_rows(float (&scores)[NT][4], Tile<T, D> a, int row0, Tile<T, D> b, int pairs, int lane) {
#pragma unroll
  for (int n = 0; n < NT; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < D; k += Fragments<T>::kK) {
    Fragments<T> f;
    f.load_a(a, row0, k, lane);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
      if (n < pairs) {
        f.load_b(b, n * 16, k, lane);
        f.multiply(scores[2 * n], scores[2 * n + 1]);
      }
    }
  }
}

// sums[16 x D] += weights[16 x 8 NT] rows[0 ...], over the first `pairs` pairs of weight tiles.
template <class T, int D, int NT>
PYVIT_DEVICE void accumulate_rows(float (&sums)[D / 8][4], const float (&weights)[NT][4], Tile<T, D> rows, int pairs, int lane) {
#pragma unroll
  for (int n = 0; n < NT / 2; ++n) {
    if (n < pairs) {
#pragma unroll
      for (int step = 0; step < 16 / Fragments<T>::kK; ++step) {
        Fragments<T> f;
        f.take_a(weights[2 * n], weights[2 * n + 1], step);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          f.load_b_transposed(rows, n * 16 + step * Fragments<T>::kK, d * 16, lane);
          f.multiply(sums[2 * d], sums[2 * d + 1]);
        }
      }
    }
  }
}

// A warp's 16 rows of accumulators to global memory through rows of `tile` that only this warp uses, in 16-byte stores.
template <class T, int D, class Target>
PYVIT_DEVICE void store_rows(Tile<T, D> tile, int row0, const float (&sums)[D / 8][4], int width, int lane, Target target) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = tile.at(row0 + g + 8 * half, n * 8 + 2 * t);
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(to) = pack(T{}, sums[n][2 * half], sums[n][2 * half + 1]);
      } else {
        to[0] = sums[n][2 * half], to[1] = sums[n][2 * half + 1];
      }
    }
  }
  warp_barrier();
  using Rows = Tile<T, D>;
  for (int c = lane; c < 16 * Rows::kChunks; c += 32) {
    const int row = c / Rows::kChunks, chunk = c % Rows::kChunks;
    T* to = chunk * Rows::kPerChunk < width ? target(row0 + row) : nullptr;
    if (to) *reinterpret_cast<Bytes16*>(to + chunk * Rows::kPerChunk) = *reinterpret_cast<const Bytes16*>(tile.chunk(row0 + row, chunk));
  }
}

// 1 / max(|row|, 1e-12) of each row of a tile, for cosine attention.
template <class T, int D>
PYVIT_DEVICE void inverse_norms(Tile<T, D> tile, int rows, float* out) {
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    float sum = 0.0f;
    for (int d = 0; d < D; ++d) {
      const float x = widen(*tile.at(row, d));
      sum += x * x;
    }
    out[row] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
  }
}

// A weight as an operand of type T: half precision would turn the inverse norm of a zero key into infinity.
template <class T>
PYVIT_DEVICE float operand(float x) {
  return x;
}
template <>
PYVIT_DEVICE float operand<f16>(float x) {
  return fminf(fmaxf(x, -65504.0f), 65504.0f);
}

template <class T, int D>
struct Stage {
  Tile<T, D> first, second;
};

// Shared memory of every kernel here: two tiles of the block's own rows, then one or two stages of two streamed tiles, then floats.
template <class T, int D, int NT>
struct Layout {
  static constexpr int kColumns = 8 * NT;
  int rows, own_tiles, stages;

  PYVIT_DEVICE Tile<T, D> own(int i) const { return {reinterpret_cast<T*>(shared_memory() + i * Tile<T, D>::bytes(rows))}; }
  PYVIT_DEVICE Stage<T, D> stage(int s) const {
    char* at = shared_memory() + own_tiles * Tile<T, D>::bytes(rows) + 2 * s * Tile<T, D>::bytes(kColumns);
    return {{reinterpret_cast<T*>(at)}, {reinterpret_cast<T*>(at + Tile<T, D>::bytes(kColumns))}};
  }
  // Per own row and per column of each stage: inverse norms; per column of each stage: log-sum-exp and delta.
  PYVIT_DEVICE float* row_norms() const { return reinterpret_cast<float*>(shared_memory() + tile_bytes()); }
  PYVIT_DEVICE float* column_norms(int s) const { return row_norms() + rows + s * kColumns; }
  PYVIT_DEVICE float* column_lse(int s) const { return row_norms() + rows + (stages + s) * kColumns; }
  PYVIT_DEVICE float* column_delta(int s) const { return row_norms() + rows + (2 * stages + s) * kColumns; }
  PYVIT_DEVICE char* rest() const { return reinterpret_cast<char*>(row_norms() + rows + 3 * stages * kColumns); }
  __host__ __device__ int tile_bytes() const {
    return own_tiles * Tile<T, D>::bytes(rows) + 2 * stages * Tile<T, D>::bytes(kColumns);
  }
  __host__ __device__ int bytes() const { return tile_bytes() + (rows + 3 * stages * kColumns) * 4; }
};

PYVIT_DEVICE int pairs_of(int count, int columns) { return (min(count, columns) + 15) / 16; }

// Which problems a block serves: `groups` contiguous ranges of them, one after another.
struct Range {
  int first, last;
};
PYVIT_DEVICE Range range_of(int64_t count, int part, int parts) { return {int(count * part / parts), int(count * (part + 1) / parts)}; }

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
      load_rows(to.first, 8 * NT, kt * 8 * NT, problem.nk, problem.d, problem.any(), [&](int j) { return problem.k(j); });
      load_rows(to.second, 8 * NT, kt * 8 * NT, problem.nk, problem.dv, problem.any(), [&](int j) { return problem.v(j); });
      copy_commit();
    };
    const int keys = problem.last_key(q0 + rows), key_tiles = (keys + 8 * NT - 1) / (8 * NT);
    load_rows(q, rows, q0, problem.nq, problem.d, problem.any(), [&](int i) { return problem.q(head, i); });
    load_keys(0);
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
    copy_wait<0>();
    if (key_tiles == 0) PYVIT_BARRIER();
    if (q0 + row0 < problem.nq) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = row_sum(total[half]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) out[n][2 * half] *= inverse, out[n][2 * half + 1] *= inverse;
        const int i = q0 + row0 + g + 8 * half;
        if (t == 0 && i < problem.nq) *problem.lse(head, i) = sum > 0.0f ? (top[half] + log2f(sum)) * kLn2 : -infinity();
      }
      store_rows(q, row0, out, problem.dv, lane, [&](int row) { return q0 + row < problem.nq ? problem.out(head, q0 + row) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
}

// lse in powers of two; a row that attends to nothing, or does not exist, gets +inf, which makes its probabilities zero.
PYVIT_DEVICE float backward_lse(float lse) { return lse == -infinity() ? infinity() : lse * kLog2e; }

template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256) attention_backward_queries(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, blockIdx.y);
  const Layout<T, D, NT> memory{rows, 2, problem.most_keys() > 8 * NT ? 2 : 1};
  problem.use(memory.rest());
  const int tiles = (problem.most_queries() + rows - 1) / rows, q0 = int(blockIdx.x % tiles) * rows;
  const int groups = gridDim.x / tiles, group = blockIdx.x / tiles;
  const Range range = range_of(problem.count(), group, groups);
  const Tile<T, D> q = memory.own(0), grad_out = memory.own(1);
  const int head = problem.head;
  float logit_sum = 0.0f;
  for (int index = range.first; index < range.last; ++index) {
    problem.begin(index);
    if (q0 >= problem.nq) continue;
    const auto load_keys = [&](int kt) {
      const Stage<T, D> to = memory.stage(kt & 1);
      load_rows(to.first, 8 * NT, kt * 8 * NT, problem.nk, problem.d, problem.any(), [&](int j) { return problem.k(j); });
      load_rows(to.second, 8 * NT, kt * 8 * NT, problem.nk, problem.dv, problem.any(), [&](int j) { return problem.v(j); });
      copy_commit();
    };
    const int keys = problem.last_key(q0 + rows), key_tiles = (keys + 8 * NT - 1) / (8 * NT);
    load_rows(q, rows, q0, problem.nq, problem.d, problem.any(), [&](int i) { return problem.q(head, i); });
    load_rows(grad_out, rows, q0, problem.nq, problem.dv, problem.any(), [&](int i) { return problem.grad_out(head, i); });
    load_keys(0);
    float lse[2], delta[2], dq[D / 8][4] = {}, dots[2] = {0.0f, 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = q0 + row0 + g + 8 * half;
      lse[half] = i < problem.nq ? backward_lse(*problem.lse(head, i)) : infinity();
      delta[half] = i < problem.nq ? problem.delta(head, i) : 0.0f;
    }
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
      float s[NT][4], dp[NT][4];
      multiply_rows<T, D, NT>(s, q, row0, stage.first, pairs, lane);
      multiply_rows<T, D, NT>(dp, grad_out, row0, stage.second, pairs, lane);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1, row = row0 + g + half * 8, column = n * 8 + 2 * t + (e & 1);
          const float key_norm = problem.cosine() ? memory.column_norms(kt & 1)[column] : 1.0f;
          const float scaled = s[n][e] * problem.scale_log2 * (problem.cosine() ? memory.row_norms()[row] * key_norm : 1.0f);
          const float p = exp2_fast(problem.score(scaled, head, q0 + row, k0 + column) - lse[half]);
          const float ds = p * (dp[n][e] - delta[half]);
          dots[half] += ds * scaled;
          s[n][e] = operand<T>(ds * key_norm);
        }
      }
      accumulate_rows<T, D, NT>(dq, s, stage.first, pairs, lane);
    }
    copy_wait<0>();
    if (key_tiles == 0) PYVIT_BARRIER();
    if (q0 + row0 < problem.nq) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + g + 8 * half;
        const float along = row_sum(dots[half]) * kLn2, norm = problem.cosine() ? memory.row_norms()[row] : 1.0f;
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
      store_rows(q, row0, dq, problem.d, lane, [&](int row) { return q0 + row < problem.nq ? problem.grad_q(head, q0 + row) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
  if (problem.cosine()) {
    logit_sum = warp_sum(logit_sum);
    float* sums = memory.row_norms();
    PYVIT_BARRIER();
    if (lane == 0) sums[warp] = logit_sum;
    PYVIT_BARRIER();
    if (thread == 0) {
      float sum = 0.0f;
      for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += sums[w];
      problem.store_logit_partial(int(blockIdx.x), int(gridDim.x), sum);
    }
  }
}

template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256) attention_backward_keys(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, blockIdx.y * Problem::queries_per_key_head(params));
  const int passes = Problem::queries_per_key_head(params);
  const Layout<T, D, NT> memory{rows, 2, problem.most_queries() * passes > 8 * NT ? 2 : 1};
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
      load_rows(to.first, 8 * NT, q0, problem.nq, problem.d, problem.any(), [&](int i) { return problem.q(head, i); });
      load_rows(to.second, 8 * NT, q0, problem.nq, problem.dv, problem.any(), [&](int i) { return problem.grad_out(head, i); });
      copy_commit();
      for (int i = thread; i < 8 * NT; i += blockDim.x) {
        const bool real = q0 + i < problem.nq;
        memory.column_lse(step & 1)[i] = real ? backward_lse(*problem.lse(head, q0 + i)) : infinity();
        memory.column_delta(step & 1)[i] = real ? problem.delta(head, q0 + i) : 0.0f;
      }
    };
    load_rows(k, rows, k0, problem.nk, problem.d, problem.any(), [&](int j) { return problem.k(j); });
    load_rows(v, rows, k0, problem.nk, problem.dv, problem.any(), [&](int j) { return problem.v(j); });
    copy_commit();
    if (steps) load_queries(0);
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
      const int head = problem.head + step / per_pass, q0 = (first_tile + step % per_pass) * 8 * NT, pairs = pairs_of(problem.nq - q0, 8 * NT);
      const float *lse = memory.column_lse(step & 1), *delta = memory.column_delta(step & 1);
      float s[NT][4], dp[NT][4];
      multiply_rows<T, D, NT>(s, k, row0, stage.first, pairs, lane);
      multiply_rows<T, D, NT>(dp, v, row0, stage.second, pairs, lane);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e >> 1, row = row0 + g + half * 8, column = n * 8 + 2 * t + (e & 1);
          const float query_norm = problem.cosine() ? memory.column_norms(step & 1)[column] : 1.0f;
          const float scaled = s[n][e] * problem.scale_log2 * (problem.cosine() ? memory.row_norms()[row] * query_norm : 1.0f);
          const float p = exp2_fast(problem.score(scaled, head, q0 + column, k0 + row) - lse[column]);
          const float ds = p * (dp[n][e] - delta[column]);
          dots[half] += ds * scaled;
          s[n][e] = p;
          dp[n][e] = operand<T>(ds * query_norm);
        }
      }
      accumulate_rows<T, D, NT>(dv, s, stage.second, pairs, lane);
      accumulate_rows<T, D, NT>(dk, dp, stage.first, pairs, lane);
    }
    copy_wait<0>();
    if (steps == 0) PYVIT_BARRIER();
    if (k0 + row0 < problem.nk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + g + 8 * half;
        const float along = row_sum(dots[half]) * kLn2, norm = problem.cosine() ? memory.row_norms()[row] : 1.0f;
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
      store_rows(k, row0, dk, problem.d, lane, [&](int row) { return k0 + row < problem.nk ? problem.grad_k(k0 + row) : nullptr; });
      store_rows(v, row0, dv, problem.dv, lane, [&](int row) { return k0 + row < problem.nk ? problem.grad_v(k0 + row) : nullptr; });
    }
    if (index + 1 < range.last) PYVIT_BARRIER();
  }
}

// Which parts of (problem, head, query tile, key tile) a block of the bias kernel owns, and which it sums over, in this order.
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

// dBias: a block owns a tile (or, where the bias broadcasts, a row, a column or one element) of one chunk's partial sums.
template <class Problem, int D, int NT>
__global__ void __launch_bounds__(256) attention_backward_bias(const __grid_constant__ typename Problem::Params params) {
  using T = typename Problem::T;
  const int thread = threadIdx.x, warp = warp_of(thread), lane = lane_of(thread), g = lane >> 2, t = lane & 3;
  const int rows = blockDim.x / 2, row0 = warp * 16;
  Problem problem(params, 0);
  const Layout<T, D, NT> memory{rows, 2, 1};
  problem.use(memory.rest());
  const bool(&broadcast)[4] = problem.bias_broadcast();
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
    load_rows(q, rows, q0, problem.nq, problem.d, problem.any(), [&](int r) { return problem.q(head, r); });
    load_rows(grad_out, rows, q0, problem.nq, problem.dv, problem.any(), [&](int r) { return problem.grad_out(head, r); });
    load_rows(stage.first, 8 * NT, k0, problem.nk, problem.d, problem.any(), [&](int j) { return problem.k(j); });
    load_rows(stage.second, 8 * NT, k0, problem.nk, problem.dv, problem.any(), [&](int j) { return problem.v(j); });
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
    float s[NT][4], dp[NT][4], lse[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = q0 + row0 + g + 8 * half;
      lse[half] = r < problem.nq ? backward_lse(*problem.lse(head, r)) : infinity();
      delta[half] = r < problem.nq ? problem.delta(head, r) : 0.0f;
    }
    multiply_rows<T, D, NT>(s, q, row0, stage.first, pairs, lane);
    multiply_rows<T, D, NT>(dp, grad_out, row0, stage.second, pairs, lane);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e >> 1, row = row0 + g + half * 8, column = n * 8 + 2 * t + (e & 1);
        const float factor = problem.cosine() ? memory.row_norms()[row] * memory.column_norms(0)[column] : 1.0f;
        const float p = exp2_fast(problem.score(s[n][e] * problem.scale_log2 * factor, head, q0 + row, k0 + column) - lse[half]);
        sums[n][e] += p * (dp[n][e] - delta[half]);
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
  const int64_t plane = (int64_t(chunk) * (broadcast[0] ? 1 : extent[0]) + (broadcast[0] ? 0 : item.at[0])) * (broadcast[1] ? 1 : extent[1]) +
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

// Rows per block: the number of warps that wastes the fewest rows and re-reads the least, within `most_bytes` of shared memory.
template <class Bytes>
int choose_warps(int n, Bytes bytes, int most_bytes = 96 << 10) {
  int best = 2;
  double least = 1e30;
  for (int warps = 2; warps <= 8; ++warps) {
    if (warps > 2 && bytes(16 * warps) > most_bytes) break;
    const int blocks = ceil_div(n, 16 * warps);
    const double cost = blocks * warps + 0.5 * blocks;
    if (cost <= least) least = cost, best = warps;
  }
  return best;
}

}  // namespace pyvit::cuda
