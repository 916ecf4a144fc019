// Running log-sum-exps of a tile's rows or columns, for losses whose scores come from a matrix product a tile at a
// time.
#include "gemm_tile.h"
#include "kernel_args.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int64_t ROWS = 16, STRIP = 4 * W;  // rows, and columns, of one unit of work

// Joins `sum`, of exp(score - top), to the running pair whose maximum was `before`.
inline void join(float before, float top, float sum, float* running_top, float* running_total) {
  *running_total = *running_total * std::exp(before - top) + sum;
  *running_top = top;
}

void of_row(const float* p, int64_t n, float* running_top, float* running_total) {
  const int64_t whole = n / W * W;
  const int left = int(n - whole);
  vf most = set1(*running_top);
  for (int64_t c = 0; c < whole; c += W) most = vmax(most, load(p + c));
  if (left) most = vmax(most, load_n(p + whole, left, -INF));
  const float before = *running_top, top = reduce_max(most);
  vf sum[2] = {};
  for (int64_t c = 0; c < whole; c += W) sum[c / W & 1] += exp2v((load(p + c) - top) * LOG2E);
  if (left) sum[0] += exp2v((load_n(p + whole, left, -INF) - top) * LOG2E);
  join(before, top, reduce_add(sum[0] + sum[1]), running_top, running_total);
}

// Columns c .. c + n of all rows, n at most W.
void of_columns(const TileScores& t, int64_t c, int n) {
  const float* p = t.scores + c;
  auto read = [&](const float* q) { return n == W ? load(q) : load_n(q, n); };
  const vf before = read(t.top + c);
  vf top = before, sum{};
  for (int64_t r = 0; r < t.rows; r++) top = vmax(top, read(p + r * t.cols));
  for (int64_t r = 0; r < t.rows; r++) sum += exp2v((read(p + r * t.cols) - top) * LOG2E);
  for (int i = 0; i < n; i++) join(before[i], top[i], sum[i], t.top + c + i, t.total + c + i);
}

}  // namespace

void log_sum_exp(const TileScores& t) {
  if (t.of_rows) {
    parallel_units((t.rows + ROWS - 1) / ROWS, [&](Queue& queue) {
      for (int64_t unit; (unit = queue.next()) >= 0;)
        for (int64_t r = unit * ROWS; r < std::min(t.rows, (unit + 1) * ROWS); r++)
          of_row(t.scores + r * t.cols, t.cols, t.top + r, t.total + r);
    });
  } else {
    parallel_units((t.cols + STRIP - 1) / STRIP, [&](Queue& queue) {
      for (int64_t unit; (unit = queue.next()) >= 0;)
        for (int64_t c = unit * STRIP; c < std::min(t.cols, (unit + 1) * STRIP); c += W)
          of_columns(t, c, int(std::min<int64_t>(W, t.cols - c)));
    });
  }
}

}  // namespace pyvit::PYVIT_ISA
