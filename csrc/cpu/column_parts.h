// How threads share the panels of columns of a product with few rows.
#pragma once

#include "gemm_tile.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {

// Into how many parts `tiles` rows of tiles are cut, so that threads share `panels` times as many evenly.
inline int64_t parts_of(int64_t panels, int64_t tiles) {
  const int64_t count = threads.count(), most = std::max<int64_t>(tiles, 1),
                least = std::clamp<int64_t>((4 * count + panels - 1) / panels, 1, most);
  const auto idle = [&](int64_t parts) { return (round_up(panels * parts, count) / double(panels * parts)); };
  int64_t best = least;
  for (int64_t parts = least; parts <= std::min(2 * least, most); parts++)
    if (idle(parts) < idle(best)) best = parts;
  return best;
}

}  // namespace pyvit::PYVIT_ISA
