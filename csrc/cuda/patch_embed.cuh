// The implicit matrices of patch embedding: pixels by patch, weights, token gradients.
#pragma once

#include "gemm.cuh"
#include "reduce.cuh"

namespace pyvit::cuda {

struct PatchGrid {
  int down, across, pixels;  // patches, and values per patch

  __host__ __device__ explicit PatchGrid(const PatchEmbed& p)
      : down((p.height - p.patch_h) / p.stride_h + 1),
        across((p.width - p.patch_w) / p.stride_w + 1),
        pixels(p.channels * p.patch_h * p.patch_w) {}
};

PYVIT_DEVICE float read_as(Type type, const void* from, int64_t at) {
  if (type == Type::f32) return static_cast<const float*>(from)[at];
  return type == Type::f16 ? widen(static_cast<const f16*>(from)[at]) : widen(static_cast<const bf16*>(from)[at]);
}
PYVIT_DEVICE void write_as(Type type, void* to, int64_t at, float value) {
  if (type == Type::f32)
    static_cast<float*>(to)[at] = value;
  else if (type == Type::f16)
    static_cast<f16*>(to)[at] = narrow<f16>(value);
  else
    static_cast<bf16*>(to)[at] = narrow<bf16>(value);
}

// Which patch token m of (batch x kept) is; -1 when there is none, or keep names none.
PYVIT_DEVICE int64_t patch_of(const PatchEmbed& p, const PatchGrid& grid, int64_t token) {
  if (token >= int64_t(p.batch) * p.kept) return -1;
  const int64_t patch = p.keep ? p.keep[token] : token % p.kept;
  return patch >= 0 && patch < int64_t(grid.down) * grid.across ? patch : -1;
}

// Line m: the pixels of token m in the weight's order (channel, row, column), normalised. Patches may overlap.
template <class T>
struct Pixels {
  const PatchEmbed& p;
  PatchGrid grid;
  struct Line {
    int64_t offset;  // of the patch's first pixel; negative when there is no patch
  };

  PYVIT_DEVICE explicit Pixels(const PatchEmbed& params) : p(params), grid(params) {}
  PYVIT_DEVICE Line line(int64_t token) const {
    const int64_t patch = patch_of(p, grid, token);
    if (patch < 0) return {-1};
    return {token / p.kept * p.image_stride[0] + patch / grid.across * p.stride_h * p.image_stride[2] +
            patch % grid.across * p.stride_w * p.image_stride[3]};
  }
  PYVIT_DEVICE float value(int64_t at, int channel) const {
    float x = p.bytes ? float(static_cast<const uint8_t*>(p.images)[at]) / 255.0f
                      : widen(static_cast<const T*>(p.images)[at]);
    if (p.mean) x = (x - p.mean[channel]) / p.std[channel];
    return x;
  }
  PYVIT_DEVICE Bytes16 load(Line line, int64_t first) const {
    constexpr int kPerChunk = 16 / int(sizeof(T));
    Bytes16 chunk{};
    if (line.offset < 0 || first >= grid.pixels) return chunk;
    const int area = p.patch_h * p.patch_w;
    int channel = int(first) / area, row = int(first) % area / p.patch_w, column = int(first) % p.patch_w;
    const auto at = [&] {
      return line.offset + channel * p.image_stride[1] + row * p.image_stride[2] + column * p.image_stride[3];
    };
    if (!p.bytes && p.mean == nullptr && p.image_stride[3] == 1 && column + kPerChunk <= p.patch_w)
      return load_chunk(static_cast<const T*>(p.images) + at(), kPerChunk);
    T* to = reinterpret_cast<T*>(&chunk);
    if (p.bytes && p.image_stride[3] == 1 && column + kPerChunk <= p.patch_w) {
      const uint8_t* from = static_cast<const uint8_t*>(p.images) + at();
      if (reinterpret_cast<uintptr_t>(from) % kPerChunk == 0) {
        uint32_t words[kPerChunk / 4];
#pragma unroll
        for (int i = 0; i < kPerChunk / 4; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
        const float mean = p.mean ? p.mean[channel] : 0.0f, deviation = p.mean ? p.std[channel] : 1.0f;
#pragma unroll
        for (int i = 0; i < kPerChunk; ++i)
          to[i] = narrow<T>((float(words[i / 4] >> (i % 4 * 8) & 255) / 255.0f - mean) / deviation);
        return chunk;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      if (channel < p.channels) to[i] = narrow<T>(value(at(), channel));
      if (++column == p.patch_w) {
        column = 0;
        if (++row == p.patch_h) row = 0, ++channel;
      }
    }
    return chunk;
  }
};

// Line n: row n of a contiguous matrix.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  struct Line {
    const T* from;
  };

  PYVIT_DEVICE Line line(int64_t row) const { return {row < rows ? data + row * columns : nullptr}; }
  PYVIT_DEVICE Bytes16 load(Line line, int64_t first) const {
    return line.from && first < columns ? load_chunk(line.from + first, columns - first) : Bytes16{};
  }
};

// Line m: the output's gradient at token m, past the prefix rows.
template <class T>
struct TokenGradients {
  const PatchEmbed& p;
  const T* grad_out;
  struct Line {
    const T* from;
  };

  PYVIT_DEVICE const T* row(int64_t token) const {
    return grad_out + ((token / p.kept) * (p.prefix_rows + p.kept) + p.prefix_rows + token % p.kept) * p.dim;
  }
  PYVIT_DEVICE Line line(int64_t token) const { return {token < int64_t(p.batch) * p.kept ? row(token) : nullptr}; }
  PYVIT_DEVICE Bytes16 load(Line line, int64_t first) const {
    return line.from && first < p.dim ? load_chunk(line.from + first, p.dim - first) : Bytes16{};
  }
};

// The gradient of the images, a cell of stride_h x stride_w pixels at a time: up to reach_h x reach_w patches overlap a
// cell, and the product runs over (patch of the cell, channel of the token), so that every pixel has one owner.
struct Cells {
  const PatchEmbed& p;
  PatchGrid grid;
  int down, across, reach_h, reach_w, dim;  // dim in whole 16-byte chunks

  __host__ __device__ explicit Cells(const PatchEmbed& params)
      : p(params),
        grid(params),
        down((params.height + params.stride_h - 1) / params.stride_h),
        across((params.width + params.stride_w - 1) / params.stride_w),
        reach_h((params.patch_h + params.stride_h - 1) / params.stride_h),
        reach_w((params.patch_w + params.stride_w - 1) / params.stride_w),
        dim((params.dim + 7) / 8 * 8) {}
  __host__ __device__ int64_t rows() const { return int64_t(p.batch) * down * across; }
  __host__ __device__ int64_t columns() const { return int64_t(p.channels) * p.stride_h * p.stride_w; }
  __host__ __device__ int64_t depth() const { return int64_t(reach_h) * reach_w * dim; }
};

// Line m: over the patches that reach cell m, the gradients of their tokens (laid out as batch x grid, `prefix` rows
// before each image).
template <class T>
struct CellGradients {
  Cells cells;
  const T* tokens;
  int prefix;
  struct Line {
    int image, y, x;
  };

  PYVIT_DEVICE Line line(int64_t cell) const {
    if (cell >= cells.rows()) return {-1, 0, 0};
    return {int(cell / cells.across / cells.down), int(cell / cells.across % cells.down), int(cell % cells.across)};
  }
  PYVIT_DEVICE Bytes16 load(Line line, int64_t first) const {
    const int which = int(first / cells.dim), d = int(first % cells.dim);
    const int y = line.y - which / cells.reach_w, x = line.x - which % cells.reach_w;
    if (line.image < 0 || first >= cells.depth() || d >= cells.p.dim || y < 0 || x < 0 || y >= cells.grid.down ||
        x >= cells.grid.across)
      return {};
    const int64_t patches = int64_t(cells.grid.down) * cells.grid.across;
    const int64_t token = line.image * (prefix + patches) + prefix + int64_t(y) * cells.grid.across + x;
    return load_chunk(tokens + token * cells.p.dim + d, cells.p.dim - d);
  }
};

// Line k: (patch of the cell, channel of the token); its elements are the weights of the cell's pixels (channel, row,
// column).
template <class T>
struct CellWeights {
  Cells cells;
  const T* weight;
  struct Line {
    int up, left, d;
  };

  PYVIT_DEVICE Line line(int64_t k) const {
    const int which = int(k / cells.dim);
    return {which / cells.reach_w, which % cells.reach_w, int(k % cells.dim)};
  }
  PYVIT_DEVICE Bytes16 load(Line line, int64_t first) const {
    const PatchEmbed& p = cells.p;
    constexpr int kPerChunk = 16 / int(sizeof(T));
    Bytes16 chunk{};
    if (line.d >= p.dim) return chunk;
    T* to = reinterpret_cast<T*>(&chunk);
    const int area = p.stride_h * p.stride_w;
    int channel = int(first / area), row = int(first % area) / p.stride_w, column = int(first % p.stride_w);
#pragma unroll
    for (int i = 0; i < kPerChunk; ++i) {
      const int y = line.up * p.stride_h + row, x = line.left * p.stride_w + column;
      if (channel < p.channels && y < p.patch_h && x < p.patch_w)
        to[i] = weight[((int64_t(line.d) * p.channels + channel) * p.patch_h + y) * p.patch_w + x];
      if (++column == p.stride_w) {
        column = 0;
        if (++row == p.stride_h) row = 0, ++channel;
      }
    }
    return chunk;
  }
};

template <class Use>
const char* with_type(Type type, Use use) {
  if (type == Type::f32) return use(float{});
  return type == Type::f16 ? use(f16{}) : use(bf16{});
}

}  // namespace pyvit::cuda
