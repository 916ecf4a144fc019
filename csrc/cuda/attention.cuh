// Attention on 16-row warps, shared by dense, packed and window attention, which differ only in where rows lie and how
// a score is made from a product (a Problem, see flash_attention.cuh and window_attention.cuh). Here are the pieces;
// the kernels are in attention_forward.cuh (online softmax), attention_backward.cuh (dQ, and dK with dV: probabilities
// come again from the log-sum-exp) and attention_bias.cuh. Every result has one owner: no atomics.
#pragma once

#include "kernel_launch.cuh"

namespace pyvit::cuda {

// 8-column tiles that a streamed tile holds, as many as the accumulators leave registers for.
template <class T, int D>
constexpr int kForwardColumns = sizeof(T) == 2 ? 8 : 4;
template <class T, int D>
constexpr int kBackwardColumns = sizeof(T) == 2 && D <= 64 ? 8 : 4;

// i strides, both of them below 2^31: one instruction.
PYVIT_DEVICE int64_t far(int i, int64_t stride) { return int64_t(uint64_t(uint32_t(i)) * uint32_t(stride)); }

// Where rows of shared memory come from: source(place) is a row's address, or null.
template <class T, int D, class Source>
struct RowSource {
  Tile<T, D> tile;
  int width;
  Source source;

  PYVIT_DEVICE void copy(int row, int chunk, const T* from, bool exists) const {
    // Where no bytes are read, the address is of no consequence.
    const auto address = reinterpret_cast<uintptr_t>(from) + chunk * 16;
    copy_async(tile.chunk(row, chunk), reinterpret_cast<const void*>(address),
               exists && from != nullptr && chunk * tile.kPerChunk < width ? 16 : 0);
  }
};
template <class T, int D, class Source>
PYVIT_DEVICE RowSource<T, D, Source> rows_of(Tile<T, D> tile, int width, Source source) {
  return {tile, width, source};
}

// Rows `first` and on of one or several tensors to shared memory, of which each row is found once; rows at `limit` and
// beyond, rows without an address and channels beyond the width become zeros.
template <class T, int D, class Problem, class... Source>
PYVIT_DEVICE void load_rows(const Problem& problem, int rows, int first, int limit,
                            const RowSource<T, D, Source>&... tensors) {
  constexpr int kChunks = Tile<T, D>::kChunks;
  for (int c = threadIdx.x; c < rows * kChunks; c += blockDim.x) {
    // Where it is known that a thread keeps its column, say so.
    const int row = c / kChunks, chunk = 32 % kChunks == 0 ? threadIdx.x % kChunks : c % kChunks;
    const auto place = problem.at(min(first + row, limit - 1));
    (tensors.copy(row, chunk, tensors.source(place), first + row < limit), ...);
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
    const auto from = f.place_b(b, k, lane);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n) {
      if (n < pairs) {
        f.load_b(from, n * 16);
        f.multiply(scores[2 * n], scores[2 * n + 1]);
      }
    }
  }
}

// sums[16 x D] += weights[16 x 8 NT] rows[0 ...], over the first `pairs` pairs of weight tiles. Addresses are kept
// (KEEP) but where those of wider rows take more registers than there are.
template <class T, int D, int NT, bool KEEP = (D <= 80)>
PYVIT_DEVICE void accumulate_rows(float (&sums)[D / 8][4], const float (&weights)[NT][4], Tile<T, D> rows, int pairs,
                                  int lane) {
  Fragments<T> f;
  typename Fragments<T>::template Place<D> from[D / 16];
#pragma unroll
  for (int d = 0; KEEP && d < D / 16; ++d) from[d] = f.place_b_transposed(rows, d * 16, lane);
#pragma unroll
  for (int n = 0; n < NT / 2; ++n) {
    if (n < pairs) {
#pragma unroll
      for (int step = 0; step < 16 / Fragments<T>::kK; ++step) {
        f.take_a(weights[2 * n], weights[2 * n + 1], step);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          if (!KEEP) from[d] = f.place_b_transposed(rows, d * 16, lane);
          f.load_b_transposed(from[d], n * 16 + step * Fragments<T>::kK);
          f.multiply(sums[2 * d], sums[2 * d + 1]);
        }
      }
    }
  }
}

// A warp's 16 rows of accumulators to global memory through rows of `tile` that only this warp uses, in 16-byte stores.
template <class T, int D, class Target>
PYVIT_DEVICE void store_rows(Tile<T, D> tile, int row0, const float (&sums)[D / 8][4], int width, int lane,
                             Target target) {
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
    if (to)
      *reinterpret_cast<Bytes16*>(to + chunk * Rows::kPerChunk) =
          *reinterpret_cast<const Bytes16*>(tile.chunk(row0 + row, chunk));
  }
}

template <class T>
PYVIT_DEVICE float dot_chunk(const T* a, const T* b) {
  const Bytes16 left = *reinterpret_cast<const Bytes16*>(a), right = *reinterpret_cast<const Bytes16*>(b);
  const T *x = reinterpret_cast<const T*>(&left), *y = reinterpret_cast<const T*>(&right);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 16 / int(sizeof(T)); ++i) sum += widen(x[i]) * widen(y[i]);
  return sum;
}

// 1 / max(|row|, 1e-12) of each row of a tile, for cosine attention.
template <class T, int D>
PYVIT_DEVICE void inverse_norms(Tile<T, D> tile, int rows, float* out) {
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < tile.kChunks; ++c) sum += dot_chunk(tile.chunk(row, c), tile.chunk(row, c));
    out[row] = 1.0f / fmaxf(sqrtf(sum), 1e-12f);
  }
}

// A warp's 16 rows of products as scores, in steps of 8 columns: for cosine attention divided by both norms; with bias,
// and -inf where a query does not attend to a key. Differences of scores times `unit`, which is positive, are in powers
// of two: a product with log2(e) before the largest is subtracted would take finite scores to infinity, and of large
// ones round what tells them apart. Rows are queries, or (KEYS) keys.
template <bool KEYS, class Problem>
struct ScoreTile {
  const Problem& problem;
  const typename Problem::ScoreRows rows;
  const float unit;
  const float *row_norms, *column_norms;
  const int column0, t;

  PYVIT_DEVICE ScoreTile(const Problem& p, int head, int row0, int column0_, int columns, const float* warp_norms,
                         const float* column_norms_, int lane)
      : problem(p),
        rows(p.template score_rows<KEYS>(head, row0, lane >> 2, column0_, columns)),
        unit(p.unit()),
        row_norms(warp_norms + (lane >> 2)),
        column_norms(column_norms_ + 2 * (lane & 3)),
        column0(column0_),
        t(lane & 3) {}
  PYVIT_DEVICE void normalize(float (&s)[4], int n) const {
    if (problem.cosine()) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[e] *= row_norms[(e >> 1) * 8] * column_norms[n * 8 + (e & 1)];
    }
  }
  PYVIT_DEVICE void finish(float (&s)[4], int n) const {
    problem.template finish_scores<KEYS>(s, rows, column0 + n * 8, 2 * t);
  }
};

// A lane's part of a query's sum of grad_out * out, of which grad_out is a row of shared memory: four lanes share its
// 16-byte chunks.
template <class Problem, class T, int D>
PYVIT_DEVICE float delta_part(const Problem& problem, Tile<T, D> grad_out, int row, int query, int t) {
  constexpr int kPerChunk = Tile<T, D>::kPerChunk;
  const T* out = query < problem.nq ? problem.out(problem.head, problem.at(query)) : nullptr;
  float sum = 0.0f;
  for (int c = t; out && c * kPerChunk < problem.dv; c += 4)
    sum += dot_chunk(out + c * kPerChunk, grad_out.chunk(row, c));
  return sum;
}

// The sum of all threads' parts of the temperature's gradient, through `sums`, which nothing else may use any more.
template <class Problem>
PYVIT_DEVICE void store_logit_sum(const Problem& problem, float part, float* sums) {
  part = warp_sum(part);
  PYVIT_BARRIER();
  if (lane_of(threadIdx.x) == 0) sums[warp_of(threadIdx.x)] = part;
  PYVIT_BARRIER();
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int w = 0; w < int(blockDim.x) / 32; ++w) sum += sums[w];
    problem.store_logit_partial(int(blockIdx.x), int(gridDim.x), sum);
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

// Shared memory of every kernel here: two tiles of the block's own rows, then one or two stages of two streamed tiles,
// then floats.
template <class T, int D, int NT>
struct Layout {
  static constexpr int kColumns = 8 * NT;
  int rows, own_tiles, stages;

  PYVIT_DEVICE Tile<T, D> own(int i) const {
    return {reinterpret_cast<T*>(shared_memory() + i * Tile<T, D>::bytes(rows))};
  }
  PYVIT_DEVICE Stage<T, D> stage(int s) const {
    char* at = shared_memory() + own_tiles * Tile<T, D>::bytes(rows) + 2 * s * Tile<T, D>::bytes(kColumns);
    return {{reinterpret_cast<T*>(at)}, {reinterpret_cast<T*>(at + Tile<T, D>::bytes(kColumns))}};
  }
  // Of each own row: its inverse norm. Of each column of a stage: inverse norm, shift, rest and delta.
  PYVIT_DEVICE float* row_norms() const { return reinterpret_cast<float*>(shared_memory() + tile_bytes()); }
  PYVIT_DEVICE float* column_norms(int s) const { return row_norms() + rows + 4 * s * kColumns; }
  PYVIT_DEVICE float* column_shift(int s) const { return column_norms(s) + kColumns; }
  PYVIT_DEVICE float* column_rest(int s) const { return column_norms(s) + 2 * kColumns; }
  PYVIT_DEVICE float* column_delta(int s) const { return column_norms(s) + 3 * kColumns; }
  PYVIT_DEVICE char* rest() const { return reinterpret_cast<char*>(row_norms() + rows + 4 * stages * kColumns); }
  __host__ __device__ int tile_bytes() const {
    return own_tiles * Tile<T, D>::bytes(rows) + 2 * stages * Tile<T, D>::bytes(kColumns);
  }
  __host__ __device__ int bytes() const { return tile_bytes() + (rows + 4 * stages * kColumns) * 4; }
};

// Stages of the pass that owns keys, which walks the queries of every head that shares them: the tiles of different
// heads are different steps, however few queries each has.
template <int NT>
__host__ __device__ int key_pass_stages(int queries, int heads) {
  return (queries + 8 * NT - 1) / (8 * NT) * heads > 1 ? 2 : 1;
}

PYVIT_DEVICE int pairs_of(int count, int columns) { return (min(count, columns) + 15) / 16; }

// Which problems a block serves: `groups` contiguous ranges of them, one after another.
struct Range {
  int first, last;
};
PYVIT_DEVICE Range range_of(int64_t count, int part, int parts) {
  return {int(count * part / parts), int(count * (part + 1) / parts)};
}

// The backward's probabilities are exp2((score - shift) * unit - rest): shift is the log-sum-exp and rest 0, or, where
// a log-sum-exp is large and float32 may have rounded away all that was added to the largest score, shift is that score
// and rest the logarithm of the sum that is left (RowSum). A row that attends to nothing, or does not exist, gets the
// shift +inf, which makes its probabilities zero.
template <class Problem>
PYVIT_DEVICE float backward_shift(const Problem& problem, float lse) {
  return lse == -infinity() ? infinity() : lse / problem.natural();
}
PYVIT_DEVICE bool large(float lse) { return fabsf(lse) > 128.0f && lse != -infinity(); }
PYVIT_DEVICE float probability(float score, float shift, float rest, float unit) {
  return exp2_fast((score - shift) * unit - rest);
}

// The largest of a row's scores and the sum of their powers, found again: two rows of a warp, four lanes each.
struct RowSum {
  float top[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};

  template <bool KEYS, class Problem, int NT>
  PYVIT_DEVICE void add(const float (&products)[NT][4], const ScoreTile<KEYS, Problem>& scores, int pairs) {
    float high[2] = {-infinity(), -infinity()};
    const auto visit = [&](auto use) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        if (n / 2 >= pairs) continue;
        float s[4] = {products[n][0], products[n][1], products[n][2], products[n][3]};
        scores.normalize(s, n);
        scores.finish(s, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) use(e >> 1, s[e]);
      }
    };
    visit([&](int half, float s) { high[half] = fmaxf(high[half], s); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      high[half] = fmaxf(top[half], row_max(high[half]));
      if (high[half] != -infinity()) total[half] *= exp2_fast((top[half] - high[half]) * scores.unit);
      top[half] = high[half];
    }
    visit([&](int half, float s) {
      if (high[half] != -infinity()) total[half] += exp2_fast((s - high[half]) * scores.unit);
    });
  }
  PYVIT_DEVICE void finish(float (&shift)[2], float (&rest)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(total[half]);
      if (shift[half] == infinity() || sum == 0.0f) continue;
      shift[half] = top[half], rest[half] = log2f(sum);
    }
  }
};

// Rows per block: the number of warps that wastes the fewest rows and re-reads the least, within `most_bytes` of shared
// memory.
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
