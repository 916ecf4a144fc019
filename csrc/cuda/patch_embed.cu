// Patch embedding as one matrix product over gathered pixels, with bias, positions, prefix tokens and the choice of
// patches in its epilogue (Dosovitskiy et al., 2021; kept patches: He et al., "Masked Autoencoders", 2022).
#include "patch_embed.cuh"

namespace pyvit::cuda {

// The output, of which row m is token m of (batch x kept): bias and position are added as it is stored.
template <class T>
struct Tokens {
  const PatchEmbed& p;
  PatchGrid grid;
  struct Row {
    T* out;  // null past the last token
    int64_t patch;
  };
  struct Column {
    int64_t n;
    float bias;
  };

  PYVIT_DEVICE Row row(int64_t m) const {
    if (m >= int64_t(p.batch) * p.kept) return {nullptr, 0};
    const int64_t at = (m / p.kept) * (p.prefix_rows + p.kept) + p.prefix_rows + m % p.kept;
    return {static_cast<T*>(p.out) + at * p.dim, patch_of(p, grid, m)};
  }
  PYVIT_DEVICE Column column(int64_t n) const {
    return {n, p.bias && n < p.dim ? read_as(p.bias_type, p.bias, n) : 0.0f};
  }
  PYVIT_DEVICE void put(const Row& row, const Column& column, float value) const {
    if (row.out == nullptr || column.n >= p.dim) return;
    value += column.bias;
    if (p.pos_embed && row.patch >= 0) value += read_as(p.pos_type, p.pos_embed, row.patch * p.dim + column.n);
    if (row.patch < 0) value = infinity() - infinity();  // keep names a patch that does not exist
    row.out[column.n] = narrow<T>(value);
  }
};

template <class T>
__global__ void __launch_bounds__(kGemmThreads) patch_embed_forward(const __grid_constant__ PatchEmbed p) {
  const Pixels<T> pixels(p);
  const Matrix<T> weight{static_cast<const T*>(p.weight), p.dim, pixels.grid.pixels};
  const int tiles = (p.dim + kGemmTile - 1) / kGemmTile;
  const int64_t m0 = int64_t(blockIdx.x / tiles) * kGemmTile, n0 = int64_t(blockIdx.x % tiles) * kGemmTile;
  multiply_tile<T, false, false>(pixels, weight, m0, n0, 0, pixels.grid.pixels, Tokens<T>{p, pixels.grid});
}

template <class T>
__global__ void __launch_bounds__(256) copy_prefix(const __grid_constant__ PatchEmbed p) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = int64_t(p.prefix_rows) * p.dim;
  if (at >= p.batch * row) return;
  static_cast<T*>(p.out)[at / row * (p.prefix_rows + p.kept) * p.dim + at % row] =
      narrow<T>(read_as(p.prefix_type, p.prefix, at % row));
}

const char* patch_embed(const PatchEmbed& p, Stream stream) {
  return with_type(p.type, [&](auto element) -> const char* {
    using T = decltype(element);
    if (p.prefix_rows) {
      const int blocks = ceil_div(int64_t(p.batch) * p.prefix_rows * p.dim, 256);
      if (const char* error = launch("copy_prefix", copy_prefix<T>, blocks, 256, 0, p, stream)) return error;
    }
    const int blocks = ceil_div(int64_t(p.batch) * p.kept, kGemmTile) * ceil_div(p.dim, kGemmTile);
    return launch("patch_embed", patch_embed_forward<T>, blocks, kGemmThreads, kGemmBytes, p, stream);
  });
}

}  // namespace pyvit::cuda
