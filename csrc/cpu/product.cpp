// Products of matrices as they lie, packed on the way: of a linear layer, of its gradients, and of scores.
#include "dtype.h"
#include "gemm_epilogue.h"
#include "layer_norm.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Lanes that are multiplied in one go, and bytes of a packed b that all threads share.
constexpr int64_t MOST_LANES = 3072, MOST_PACKED = 6 << 20;
// Where k is long and the result has few bytes, each thread takes a stretch of k instead of rows, a few lanes at a
// time: then both operands stay in L2.
constexpr int64_t FEW_LANES = 256, FEW_BYTES = 1 << 20;
// Rows that are few, and for them the columns and lanes that are packed at a time.
constexpr int64_t FEW_ROWS = 512, MOST_WIDE = 3 * NR, STRIPE_LANES = 768;

// Memory to fetch in the course of the tiles, a share in each.
class Shares {
 public:
  Shares(const void* first, const void* last, int64_t tiles)
      : at_(static_cast<const char*>(first)),
        end_(static_cast<const char*>(last)),
        share_(((end_ - at_) / 64 / tiles + 1) * 64) {}
  void next(Prefetch& to) {
    const int64_t bytes = std::min<int64_t>(share_, end_ - at_);
    if (bytes > 0) to.add(at_, 0, 1, bytes, true);
    at_ += share_;
  }

 private:
  const char *at_, *end_;
  int64_t share_;
};

// To out, on top of what is there or in `before`; null for nothing.
template <class O>
struct Sum {
  O* out;
  int64_t ld;
  const float* before;
  int64_t before_ld;
  Shares *a = nullptr, *b = nullptr;
  void ahead(Prefetch& lines, int64_t r, int64_t high, int64_t c, int64_t width) const {
    lines.add(out + r * ld + c, ld, high, width, true);
    if (a) a->next(lines);
    if (b) b->next(lines);
  }
  template <class N>
  void put(int64_t r, int64_t c, vf y, N left) const {
    if (before) y += read(before + r * before_ld + c, left);
    write(out + r * ld + c, y, left);
  }
};

template <class T, class B>
struct Multiplier {
  using D = Compute<T>;
  const Product& p;

  const T* a(int64_t row, int64_t k) const {
    return static_cast<const T*>(p.a.data) + (p.a.column_major ? k * p.a.ld + row : row * p.a.ld + k);
  }
  const B* b(int64_t k, int64_t col) const {
    return static_cast<const B*>(p.b.data) + (p.b.column_major ? col * p.b.ld + k : k * p.b.ld + col);
  }
  // Words that `rows` rows of a and `lanes` lanes take, packed.
  static int64_t packed_rows(int64_t rows, int64_t lanes) { return (rows + MR - 1) / MR * column_major_tile(lanes); }
  // Rows of a as the tiles take them: where they lie, or packed in `memory`.
  Rows rows(int64_t row, int64_t high, int64_t k, int64_t length, uint32_t* memory) const {
    const int64_t lanes = lanes_of<D>(length);
    const T* from = a(row, k);
    if (p.a.column_major) {
      pack_a_column_major<D>(from, p.a.ld, high, p.n - row, length, memory);
      return {memory, column_major_tile(lanes), 1, MR};
    }
    if (std::is_same_v<T, typename D::element> && length % D::K == 0 && p.a.ld % D::K == 0 && uintptr_t(from) % 4 == 0)
      return rows_along(reinterpret_cast<const uint32_t*>(from), p.a.ld / D::K);
    pack_a<D>(from, p.a.ld, high, length, memory);
    return rows_along(memory, lanes);
  }
  // Columns col .. col + wide of b, col a multiple of NR.
  void pack(int64_t k, int64_t length, int64_t col, int64_t wide, uint32_t* to) const {
    if (p.b.column_major) {
      pack_cols<D>(b(k, col), p.b.ld, length, wide, to);
    } else {
      pack_rows<D>(b(k, col), p.b.ld, length, wide, to);
    }
  }
};

// A stretch of k to every thread, and the sum of what they found. What comes next is fetched meanwhile.
template <class T, class O>
void by_parts(const Product& p, int64_t parts) {
  using D = Compute<T>;
  const Multiplier<T, T> of{p};
  const int64_t stretch = round_up((p.k + parts - 1) / parts, D::K),
                goes = (stretch / D::K + FEW_LANES - 1) / FEW_LANES, few = (stretch / D::K + goes - 1) / goes,
                block = std::min(p.n, rows_of_block(p.n, few * 4)), ld = round_up(p.m, W), size = p.n * ld,
                tiles = ((p.n + MR - 1) / MR) * ((p.m + NR - 1) / NR);
  Scratch& common = shared();
  const float* bias = widened(p.bias, p.b_dtype, p.m, 0.f, common);
  const float* none = widened(nullptr, p.dtype, p.m, 0.f, common);
  float* sums = common.take<float>(parts * size);
  parallel_units(parts, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* packed = memory.take<uint32_t>(few * round_up(p.m, W));
    uint32_t* rows = memory.take<uint32_t>(of.packed_rows(block, few));
    for (int64_t part; (part = queue.next()) >= 0;) {
      const int64_t first = std::min(p.k, part * stretch), end = std::min(p.k, first + stretch);
      float* sum = sums + part * size;
      for (int64_t k = first; k < end || k == first; k += few * D::K) {
        const int64_t next = std::min(end, k + few * D::K), after = std::min(end, next + few * D::K), length = next - k;
        Shares a(of.a(0, next), of.a(0, after), tiles), b(of.b(next, 0), of.b(after, 0), tiles);
        of.pack(k, length, 0, p.m, packed);
        for (int64_t r = 0; r < p.n; r += block) {
          const int64_t high = std::min(block, p.n - r);
          float* to = sum + r * ld;
          multiply<D, false>(high, of.rows(r, high, k, length, rows), Panels{packed, lanes_of<D>(length), p.m}, none,
                             nullptr, Sum<float>{to, ld, k > first ? to : nullptr, ld, &a, &b});
        }
      }
    }
  });
  constexpr int64_t ROWS = 16;
  parallel_units((p.n + ROWS - 1) / ROWS, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;)
      for (int64_t r = unit * ROWS; r < std::min(p.n, unit * ROWS + ROWS); r++) {
        O* out = static_cast<O*>(p.out) + r * p.ldo;
        vectors(p.m, [&](int64_t c, int left) {
          vf y = load(bias + c);
          for (int64_t part = 0; part < parts; part++) y += load(sums + part * size + r * ld + c);
          if constexpr (std::is_same_v<O, float>)
            if (p.add) y += read(out + c, left);
          write(out + c, y, left);
        });
      }
  });
}

// Where the product of one stretch of k after another goes: to out, and until the last one, if out is too narrow to
// hold sums, to `sums`.
template <class O>
struct Destination {
  const Product& p;
  const float *bias, *none;
  float* sums;  // of the columns from `col` on, null where out holds them
  int64_t ld;
  template <class D>
  void put(int64_t row, int64_t high, int64_t col, const Rows& rows, const Panels& panels, bool first,
           bool last) const {
    O* out = static_cast<O*>(p.out) + row * p.ldo + col;
    float* so_far = sums ? sums + row * ld : nullptr;
    int64_t step = ld;
    if constexpr (std::is_same_v<O, float>) {
      so_far = out;
      step = p.ldo;
    }
    const float* before = first && !p.add ? nullptr : so_far;
    if (last) return multiply<D, false>(high, rows, panels, bias + col, nullptr, Sum<O>{out, p.ldo, before, step});
    multiply<D, false>(high, rows, panels, none, nullptr, Sum<float>{so_far, step, before, step});
  }
};

// How k is cut into stretches of `most` lanes or fewer; those of a stretch.
template <class D>
inline int64_t stretch_of(int64_t k, int64_t most) {
  const int64_t lanes = std::max<int64_t>(lanes_of<D>(k), 1), stretches = (lanes + most - 1) / most;
  return (lanes + stretches - 1) / stretches;
}

// Blocks of rows to the threads; b is packed once for all.
template <class T, class B, class O>
void by_rows(const Product& p) {
  using D = Compute<T>;
  const Multiplier<T, B> of{p};
  const int64_t lanes = stretch_of<D>(p.k, MOST_LANES), most = lanes * D::K,
                wide = std::max<int64_t>(MOST_PACKED / 4 / lanes / NR * NR, NR), block = rows_of_block(p.n, lanes * 4);
  Scratch& common = shared();
  const float* bias = widened(p.bias, p.b_dtype, p.m, 0.f, common);
  const float* none = widened(nullptr, p.dtype, p.m, 0.f, common);
  uint32_t* packed = common.take<uint32_t>(lanes * round_up(std::min(p.m, wide), W));
  const bool sums_elsewhere = !std::is_same_v<O, float> && most < p.k;
  const int64_t ld = round_up(std::min(p.m, wide), W);
  const Destination<O> to{p, bias, none, common.take<float>(sums_elsewhere ? p.n * ld : 0), ld};

  for (int64_t col = 0; col < p.m; col += wide) {
    const int64_t cols = std::min(wide, p.m - col);
    for (int64_t k = 0; k < p.k || !k; k += most) {
      const int64_t length = std::min(most, p.k - k), high_k = lanes_of<D>(length);
      parallel_units((cols + NR - 1) / NR, [&](Queue& queue) {
        for (int64_t unit; (unit = queue.next()) >= 0;) {
          const int64_t c = unit * NR;
          of.pack(k, length, col + c, std::min<int64_t>(NR, cols - c), packed + c * high_k);
        }
      });
      parallel_units((p.n + block - 1) / block, [&](Queue& queue) {
        uint32_t* memory = scratch().take<uint32_t>(of.packed_rows(block, lanes));
        for (int64_t unit; (unit = queue.next()) >= 0;) {
          const int64_t r = unit * block, high = std::min(block, p.n - r);
          to.template put<D>(r, high, col, of.rows(r, high, k, length, memory), Panels{packed, high_k, cols}, !k,
                             k + length == p.k);
        }
      });
    }
  }
}

// Few rows: a stripe of columns to a thread, whose packed b stays in its L2.
template <class T, class B, class O>
void by_columns(const Product& p, int64_t wide) {
  using D = Compute<T>;
  const Multiplier<T, B> of{p};
  const int64_t lanes = stretch_of<D>(p.k, STRIPE_LANES), most = lanes * D::K, block = std::min<int64_t>(p.n, 16 * MR);
  Scratch& common = shared();
  const float* bias = widened(p.bias, p.b_dtype, p.m, 0.f, common);
  const float* none = widened(nullptr, p.dtype, p.m, 0.f, common);
  const bool sums_elsewhere = !std::is_same_v<O, float> && most < p.k;
  parallel_units((p.m + wide - 1) / wide, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* packed = memory.take<uint32_t>(lanes * wide);
    uint32_t* rows = memory.take<uint32_t>(of.packed_rows(block, lanes));
    const Destination<O> to{p, bias, none, memory.take<float>(sums_elsewhere ? p.n * wide : 0), wide};
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t col = unit * wide, cols = std::min(wide, p.m - col);
      for (int64_t k = 0; k < p.k || !k; k += most) {
        const int64_t length = std::min(most, p.k - k);
        of.pack(k, length, col, cols, packed);
        for (int64_t r = 0; r < p.n; r += block) {
          const int64_t high = std::min(block, p.n - r);
          to.template put<D>(r, high, col, of.rows(r, high, k, length, rows), Panels{packed, lanes_of<D>(length), cols},
                             !k, k + length == p.k);
        }
      }
    }
  });
}

template <class T, class B, class O>
void run(const Product& p) {
  if constexpr (std::is_same_v<T, B>) {
    const int64_t parts = threads.count();
    const bool few = p.n * p.m * 4 <= FEW_BYTES && lanes_of<Compute<T>>(p.k) >= 2 * FEW_LANES * parts;
    if (few && parts > 1 && p.a.column_major && !p.b.column_major) return by_parts<T, O>(p, parts);
  }
  const int64_t units = 2 * threads.count(), wide = std::min((p.m / units + NR - 1) / NR * NR, MOST_WIDE);
  p.n <= FEW_ROWS && !p.a.column_major && p.m >= units * NR ? by_columns<T, B, O>(p, wide) : by_rows<T, B, O>(p);
}
template <class T, class B>
void run(const Product& p) {
  p.out_dtype == Dtype::f32 ? run<T, B, float>(p) : run<T, B, T>(p);
}
template <class T>
void run(const Product& p) {
  p.b_dtype == Dtype::f32 ? run<T, float>(p) : run<T, T>(p);
}

}  // namespace

void product(const Product& p) {
  with_dtype(p.dtype, [&](auto t) { run<decltype(t)>(p); });
}

}  // namespace pyvit::PYVIT_ISA
