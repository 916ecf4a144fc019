// Patch embedding as a matrix product over patches, forward and backward: A (patches x pixels of a patch) is gathered
// block by block into a buffer that stays in L2, never as a whole; the weight is packed once per call.
//
// Every output element, gradients included, is summed by one thread in an order that follows from the shape alone.
#include <vector>

#include "dtype.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {

inline vf load(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf);
}
inline float to_float(uint8_t x) { return float(x); }

namespace {

constexpr int64_t BLOCK_WORDS = 64 << 10;  // of a block of A: a quarter of the L2 cache of current processors
constexpr int64_t MAX_ROWS = 192;          // and of its rows, where patches are small
constexpr int64_t K_LANES = 256;           // lanes of a panel that a block of rows passes over before the next ones
constexpr int64_t A_WIDTH = 48;            // columns of a panel of A^T: whole register tiles and whole vectors
constexpr int64_t CHUNK_ROWS = 1024;       // patches packed at once for the weight's gradient

int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Sizes that follow from the call.
struct Geometry {
  int64_t area, k, columns, tokens;  // pixels of a patch in one channel and in all, patches per row, tokens per image

  explicit Geometry(const Patch& p)
      : area(p.ph * p.pw),
        k(p.channels * area),
        columns((p.width - p.pw) / p.sw + 1),
        tokens(p.prefix_tokens + p.kept) {}
  static int64_t patch(const Patch& p, int64_t image, int64_t at) { return p.keep ? p.keep[image * p.kept + at] : at; }
};

// Gathers patches as rows of pixels (channel, y, x), normalised, in the element type E of the product.
template <class T, class E>
class Gather {
 public:
  explicit Gather(const Patch& p) : p_(p), g_(p), scale_(p.channels), shift_(p.channels) {
    for (int64_t c = 0; c < p.channels; c++) {
      const double std = p.std ? p.std[c] : 1., mean = p.mean ? p.mean[c] : 0.;
      scale_[c] = float(1. / (p.bytes ? 255. * std : std));
      shift_[c] = float(-mean / std);
    }
  }

  // Kept patches at .. at + n of an image. Rows are written in ascending order, each with up to W - 1 elements too
  // many: `out` holds W more than n * ld.
  void rows(int64_t image, int64_t at, int64_t n, E* out, int64_t ld) const {
    Origin here = origin(image, at);
    for (int64_t r = 0; r < n; r++, out += ld) {
      const Origin next = r + 1 < n ? origin(image, at + r + 1) : here;
      if (p_.bytes) {
        row(static_cast<const uint8_t*>(p_.images) + here.offset, p_.width - here.x, next.offset - here.offset, out);
      } else {
        row(static_cast<const T*>(p_.images) + here.offset, p_.width - here.x, next.offset - here.offset, out);
      }
      for (int64_t k = g_.k; k < ld; k++) out[k] = from_float<E>(0.f);
      here = next;
    }
  }

 private:
  struct Origin {
    int64_t x, offset;  // first column of the patch; its first pixel
  };
  Origin origin(int64_t image, int64_t at) const {
    const int64_t patch = Geometry::patch(p_, image, at), x = patch % g_.columns * p_.sw;
    return {x, image * p_.image_b + patch / g_.columns * p_.sh * p_.image_y + x * p_.image_x};
  }

  // `right`: pixels from the patch's first to the end of the image's row, which may be read; `next`: elements to the
  // patch that follows, fetched meanwhile, since its lines are too far apart for the processor to foresee.
  template <class P>
  void row(const P* source, int64_t right, int64_t next, E* out) const {
    for (int64_t c = 0; c < p_.channels; c++) {
      const float scale = scale_[c], shift = shift_[c];
      for (int64_t y = 0; y < p_.ph; y++, out += p_.pw) {
        const P* s = source + c * p_.image_c + y * p_.image_y;
        __builtin_prefetch(s + next);
        if (p_.image_x == 1) {
          for (int64_t x = 0; x < p_.pw; x += W) {
            vf v;
            if (x + W <= right) {
              v = load(s + x);
            } else {
              v = vf{};
              for (int64_t i = x; i < p_.pw; i++) v[i - x] = to_float(s[i]);
            }
            store(out + x, v * scale + shift);
          }
        } else {
          for (int64_t x = 0; x < p_.pw; x++) out[x] = from_float<E>(to_float(s[x * p_.image_x]) * scale + shift);
        }
      }
    }
  }

  const Patch& p_;
  const Geometry g_;
  std::vector<float> scale_, shift_;
};

// Rows of a block so that its A keeps to BLOCK_WORDS, in nearly equal blocks.
int64_t block_rows(int64_t rows, int64_t lanes) {
  const int64_t most = std::clamp<int64_t>(BLOCK_WORDS / std::max<int64_t>(lanes, 1) / MR * MR, MR, MAX_ROWS);
  return round_up(div_up(rows, div_up(rows, most)), MR);
}

// C (rows x at most NR columns, row stride NR) = A times one panel, in steps of K that keep the panel's part near.
template <class D>
void panel_product(int64_t rows, int64_t cols, int64_t lanes, const uint32_t* a, int64_t lda, const uint32_t* panel,
                   float* c, int64_t ldc) {
  const int64_t width = std::min<int64_t>(NR, round_up(cols, W));
  for (int64_t k = 0; k < lanes; k += K_LANES)
    gemm<D>(rows, cols, std::min(K_LANES, lanes - k), a + k, lda, 1, panel + k * width, lanes, c, ldc, k > 0);
}

template <class T>
void copy_prefix(const Patch& p, int64_t image) {
  T* out = static_cast<T*>(p.out) + image * (p.prefix_tokens + p.kept) * p.dim;
  for (int64_t i = 0; i < p.prefix_tokens * p.dim; i++) out[i] = from_float<T>(p.prefix[i]);
}

// Columns col .. col + cols of the tokens of n patches from `first` on, counted through all images: products (n, NR)
// plus bias and position.
template <class T>
void store_tokens(const Patch& p, const Geometry& g, int64_t first, int64_t n, int64_t col, int64_t cols,
                  const float* products) {
  for (int64_t r = 0; r < n; r++, products += NR) {
    const int64_t image = (first + r) / p.kept, at = (first + r) % p.kept;
    const float* pos = p.pos ? p.pos + Geometry::patch(p, image, at) * p.dim + col : nullptr;
    T* out = static_cast<T*>(p.out) + (image * g.tokens + p.prefix_tokens + at) * p.dim + col;
    vectors(cols, [&](int64_t i, int left) {
      vf v = load(products + i);
      if (p.bias) v += read(p.bias + col + i, left);
      if (pos) v += read(pos + i, left);
      write(out + i, v, left);
    });
  }
}

template <class T>
void forward(const Patch& p) {
  using D = Compute<T>;
  using E = typename D::element;
  const Geometry g(p);
  const int64_t lanes = lanes_of<D>(g.k), rows = p.batch * p.kept, panels = div_up(p.dim, NR);
  uint32_t* weight = shared().take<uint32_t>(packed_size<D>(g.k, p.dim));
  const int64_t prefixed = p.prefix ? p.batch : 0;
  parallel_units((rows ? panels : 0) + prefixed, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      if (unit < prefixed) {
        copy_prefix<T>(p, unit);
      } else {
        const int64_t n = (unit - prefixed) * NR;
        pack_cols<D>(static_cast<const T*>(p.weight) + n * g.k, g.k, g.k, std::min<int64_t>(NR, p.dim - n),
                     weight + n * lanes);
      }
    }
  });
  if (!rows) return;

  // Few patches: the columns are split too, so that every thread has work.
  const int64_t at_once = block_rows(rows, lanes), blocks = div_up(rows, at_once);
  const int64_t groups = std::clamp<int64_t>(div_up(16 * threads.count(), blocks), 1, panels);
  const Gather<T, E> gather(p);
  parallel_units(blocks * groups, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* a = memory.take<uint32_t>(at_once * lanes + W);  // (at_once, lanes)
    float* c = memory.take<float>(at_once * NR);               // (at_once, NR)
    int64_t gathered = -1;
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t block = unit / groups, group = unit % groups, first = block * at_once;
      const int64_t n = std::min(at_once, rows - first);
      if (block != gathered) {
        for (int64_t r = 0; r < n;) {
          const int64_t at = (first + r) % p.kept, count = std::min(n - r, p.kept - at);
          gather.rows((first + r) / p.kept, at, count, reinterpret_cast<E*>(a + r * lanes), lanes * D::K);
          r += count;
        }
        gathered = block;
      }
      for (int64_t panel = group * panels / groups; panel < (group + 1) * panels / groups; panel++) {
        const int64_t col = panel * NR, cols = std::min<int64_t>(NR, p.dim - col);
        panel_product<D>(n, cols, lanes, a, lanes, weight + col * lanes, c, NR);
        store_tokens<T>(p, g, first, n, col, cols, c);
      }
    }
  });
}

// One panel of k rows of a row-major source, as many columns as there are: `slots` lanes, zero beyond the rows.
template <class D, class T>
void pack_panel(const T* src, int64_t ld, int64_t k, int64_t cols, int64_t slots, uint32_t* out) {
  const int64_t lanes = lanes_of<D>(k);
  for (int64_t l = 0; l < lanes; l++)
    for (int64_t n = 0; n < cols; n += W, out += W)
      store_as(out, lanes_of_rows<D>(src + l * D::K * ld + n, ld, cols - n, l * D::K + 1 < k));
  std::fill_n(out, (slots - lanes) * round_up(cols, W), 0u);
}

// grad_weight = grad_out^T A. Pieces are patches of one image; a chunk of pieces is packed, then every tile of the
// result adds its products over the chunk.
template <class T>
void weight_gradient(const Patch& p, const PatchGrad& grad) {
  using D = Compute<T>;
  using E = typename D::element;
  const Geometry g(p);
  const int64_t per_image = div_up(p.kept, CHUNK_ROWS);
  const int64_t piece = round_up(div_up(p.kept, per_image), D::K), piece_lanes = piece / D::K;
  const int64_t pieces = p.batch * div_up(p.kept, piece), splits = div_up(p.kept, piece);
  const int64_t at_once = std::max<int64_t>(1, CHUNK_ROWS / piece), lanes = at_once * piece_lanes;
  const int64_t blocks = div_up(p.dim, A_WIDTH), panels = div_up(g.k, NR), ldw = round_up(g.k, W);
  Scratch& memory = shared();
  uint32_t* a = memory.take<uint32_t>(blocks * A_WIDTH * lanes);  // panels of grad_out (chunk, dim)
  uint32_t* b = memory.take<uint32_t>(ldw * lanes);               // panels of pixels (chunk, k)
  float* sum = grad.grad_weight;
  if (ldw != g.k) {
    sum = memory.take<float>(p.dim * ldw);
    std::fill(sum, sum + p.dim * ldw, 0.f);
  }
  const Gather<T, E> gather(p);
  for (int64_t start = 0; start < pieces; start += at_once) {
    const int64_t here = std::min(at_once, pieces - start);
    parallel_units(here, [&](Queue& queue) {
      const int64_t ld = round_up(g.k, D::K), step = std::min<int64_t>(piece, 64);
      E* pixels = scratch().take<E>(step * ld + W);
      for (int64_t unit; (unit = queue.next()) >= 0;) {
        const int64_t image = (start + unit) / splits, first = (start + unit) % splits * piece;
        for (int64_t r = 0; r < piece; r += step) {
          const int64_t at = first + r, n = std::clamp<int64_t>(p.kept - at, 0, std::min(step, piece - r));
          const int64_t slots = lanes_of<D>(std::min(step, piece - r)), lane = unit * piece_lanes + r / D::K;
          const T* rows = static_cast<const T*>(grad.grad_out) + (image * g.tokens + p.prefix_tokens + at) * p.dim;
          gather.rows(image, at, n, pixels, ld);
          for (int64_t d = 0; d < p.dim; d += A_WIDTH) {
            const int64_t cols = std::min(A_WIDTH, p.dim - d);
            pack_panel<D>(rows + d, p.dim, n, cols, slots, a + d * lanes + lane * round_up(cols, W));
          }
          for (int64_t k = 0; k < g.k; k += NR) {
            const int64_t cols = std::min<int64_t>(NR, g.k - k);
            pack_panel<D>(pixels + k, ld, n, cols, slots, b + k * lanes + lane * round_up(cols, W));
          }
        }
      }
    });
    parallel_units(panels * blocks, [&](Queue& queue) {
      for (int64_t unit; (unit = queue.next()) >= 0;) {
        const int64_t k = unit / blocks * NR, d = unit % blocks * A_WIDTH;
        const int64_t rows = std::min(A_WIDTH, p.dim - d);
        gemm<D>(rows, std::min<int64_t>(NR, g.k - k), here * piece_lanes, a + d * lanes, 1, round_up(rows, W),
                b + k * lanes, lanes, sum + d * ldw + k, ldw, true);
      }
    });
  }
  if (sum != grad.grad_weight)
    for (int64_t d = 0; d < p.dim; d++) std::copy_n(sum + d * ldw, g.k, grad.grad_weight + d * g.k);
}

// Sums of grad_out over patches: bias, positions and prefix. A unit owns some columns.
template <class T>
void token_gradients(const Patch& p, const PatchGrad& grad) {
  constexpr int64_t WIDTH = 2 * W;
  const Geometry g(p);
  parallel_units(div_up(p.dim, WIDTH), [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;)
      for (int64_t col = unit * WIDTH; col < std::min(p.dim, (unit + 1) * WIDTH); col += W) {
        const int left = int(std::min<int64_t>(W, p.dim - col));
        auto read = [&](const auto* q) { return left == W ? load(q) : load_n(q, left); };
        auto add = [&](float* q, vf v) { left == W ? store(q, read(q) + v) : store_n(q, read(q) + v, left); };
        for (int64_t image = 0; image < p.batch; image++) {
          const T* rows = static_cast<const T*>(grad.grad_out) + image * g.tokens * p.dim + col;
          if (grad.grad_prefix)
            for (int64_t i = 0; i < p.prefix_tokens; i++)
              add(grad.grad_prefix + i * p.dim + col, read(rows + i * p.dim));
          rows += p.prefix_tokens * p.dim;
          vf sum{};  // of one image: bounds the rounding error of a long sum
          for (int64_t i = 0; i < p.kept; i++) {
            const vf v = read(rows + i * p.dim);
            sum += v;
            if (grad.grad_pos) add(grad.grad_pos + Geometry::patch(p, image, i) * p.dim + col, v);
          }
          if (grad.grad_bias) add(grad.grad_bias + col, sum);
        }
      }
  });
}

// grad_images = grad_out W, added into the pixels each patch was read from. A unit owns some channels of one image, or
// some of its patches where no two share a pixel.
template <class T>
void image_gradient(const Patch& p, const PatchGrad& grad) {
  using D = Compute<T>;
  const Geometry g(p);
  const int64_t lanes = lanes_of<D>(p.dim), channels = g.area < NR ? p.channels : 1, groups = p.channels / channels;
  const int64_t cols = channels * g.area, ldc = round_up(cols, W), panels = div_up(cols, NR);
  const int64_t at_once = block_rows(p.kept, std::max(lanes, ldc));
  const bool disjoint = !p.keep && p.sh == p.ph && p.sw == p.pw;
  const int64_t splits = disjoint ? div_up(p.kept, at_once) : 1, span = disjoint ? at_once : p.kept;
  uint32_t* weight = shared().take<uint32_t>(groups * lanes * ldc);
  parallel_units(groups * panels, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t group = unit / panels, n = unit % panels * NR;
      pack_rows<D>(static_cast<const T*>(p.weight) + group * cols + n, g.k, p.dim, std::min<int64_t>(NR, cols - n),
                   weight + group * lanes * ldc + n * lanes);
    }
  });
  parallel_units(p.batch * groups * splits, [&](Queue& queue) {
    Scratch& memory = scratch();
    uint32_t* a = memory.take<uint32_t>(at_once * lanes);
    float* c = memory.take<float>(at_once * ldc);
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t image = unit / splits / groups, group = unit / splits % groups, first = unit % splits * span;
      for (int64_t at = first; at < std::min(first + span, p.kept); at += at_once) {
        const int64_t n = std::min(at_once, p.kept - at);
        pack_a<D>(static_cast<const T*>(grad.grad_out) + (image * g.tokens + p.prefix_tokens + at) * p.dim, p.dim, n,
                  p.dim, a);
        gemm<D>(n, cols, lanes, a, lanes, 1, weight + group * lanes * ldc, lanes, c, ldc);
        for (int64_t r = 0; r < n; r++) {
          const int64_t patch = Geometry::patch(p, image, at + r);
          const float* pixels = c + r * ldc;
          for (int64_t channel = group * channels; channel < (group + 1) * channels; channel++) {
            const float scale = p.std ? 1.f / p.std[channel] : 1.f;
            float* out = grad.grad_images + (image * p.channels + channel) * p.height * p.width +
                         patch / g.columns * p.sh * p.width + patch % g.columns * p.sw;
            for (int64_t y = 0; y < p.ph; y++, pixels += p.pw)
              for (int64_t x = 0; x < p.pw; x++) out[y * p.width + x] += pixels[x] * scale;
          }
        }
      }
    }
  });
}

template <class T>
void backward(const Patch& p, const PatchGrad& grad) {
  token_gradients<T>(p, grad);
  if (!p.batch || !p.kept) return;
  if (grad.grad_weight) weight_gradient<T>(p, grad);
  if (grad.grad_images) image_gradient<T>(p, grad);
}

}  // namespace

void patch(const Patch& p) {
  with_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p); });
}
void patch_backward(const Patch& p, const PatchGrad& grad) {
  with_dtype(p.dtype, [&](auto t) { backward<decltype(t)>(p, grad); });
}

}  // namespace pyvit::PYVIT_ISA
