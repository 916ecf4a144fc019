// Matrices copied with columns for rows.
#include <algorithm>
#include <cstring>

#include "kernel_args.h"
#include "parallel.h"
#include "vec.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Four vectors of four lanes.
template <class T>
inline void transpose_4x4(const T* in, int64_t ld, T* out, int64_t ld_out) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  V r[4];
  for (int i = 0; i < 4; i++) std::memcpy(&r[i], in + i * ld, sizeof(V));
  const V a = __builtin_shufflevector(r[0], r[2], 0, 4, 1, 5), b = __builtin_shufflevector(r[1], r[3], 0, 4, 1, 5),
          c = __builtin_shufflevector(r[0], r[2], 2, 6, 3, 7), d = __builtin_shufflevector(r[1], r[3], 2, 6, 3, 7);
  const V t[4] = {__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7),
                  __builtin_shufflevector(c, d, 0, 4, 1, 5), __builtin_shufflevector(c, d, 2, 6, 3, 7)};
  for (int i = 0; i < 4; i++) std::memcpy(out + i * ld_out, &t[i], sizeof(V));
}

// Blocks of a cache line by a cache line, four side by side: every line is used whole.
template <class T>
void run(const Transposition& m) {
  constexpr int64_t LINE = 64 / sizeof(T), BAND = 4 * LINE;
  const T* in = static_cast<const T*>(m.in);
  T* out = static_cast<T*>(m.out);
  parallel_units((m.cols + BAND - 1) / BAND, [&](Queue& queue) {
    for (int64_t band; (band = queue.next()) >= 0;)
      for (int64_t r = 0; r < m.rows; r += LINE)
        for (int64_t c = band * BAND, end = std::min(c + BAND, m.cols); c < end; c += LINE) {
          const int64_t high = std::min(LINE, m.rows - r), wide = std::min(LINE, end - c);
          const T* from = in + r * m.cols + c;
          T* to = out + c * m.rows + r;
          for (int64_t j = 0; j < wide; j += 4)
            for (int64_t i = 0; i < high; i += 4) {
              if (i + 4 <= high && j + 4 <= wide) {
                transpose_4x4(from + i * m.cols + j, m.cols, to + j * m.rows + i, m.rows);
                continue;
              }
              for (int64_t y = i; y < std::min(i + 4, high); y++)
                for (int64_t x = j; x < std::min(j + 4, wide); x++) to[x * m.rows + y] = from[y * m.cols + x];
            }
        }
  });
}

}  // namespace

void transpose(const Transposition& m) { m.bytes == 4 ? run<uint32_t>(m) : run<uint16_t>(m); }

}  // namespace pyvit::PYVIT_ISA
