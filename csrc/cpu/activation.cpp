// Activations, gates and their gradients: each in one pass over memory, the gradient with the sums of its columns (a
// bias's gradient) and, where asked, the activation again, so that nothing but its argument need be kept.
#include "activation.h"

#include "dtype.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace pyvit::PYVIT_ISA {
namespace {

// Rows of one unit of work. Column sums are of one unit first, which bounds their rounding error; the number does not
// depend on threads.
constexpr int64_t ROWS = 32;

template <class Y, class T>
void forward(const Activation& a) {
  const int64_t n = a.rows * a.cols, step = 16384;
  const T* in = static_cast<const T*>(a.in);
  T* out = static_cast<T*>(a.out);
  parallel_units((n + step - 1) / step, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      const int64_t at = unit * step;
      vectors(std::min(step, n - at),
              [&](int64_t i, int left) { write(out + at + i, Y::value(read(in + at + i, left)), left); });
    }
  });
}

template <class Y, class T, bool AGAIN>
void backward(const Activation& a) {
  const int64_t units = (a.rows + ROWS - 1) / ROWS, ld = round_up(a.cols, W);
  float* sums = shared().take<float>(units * ld);
  parallel_units(units, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      float* sum = sums + unit * ld;
      std::fill_n(sum, ld, 0.f);
      for (int64_t row = unit * ROWS; row < std::min(a.rows, (unit + 1) * ROWS); row++) {
        const int64_t at = row * a.cols;
        const T *in = static_cast<const T*>(a.in) + at, *grad = static_cast<const T*>(a.grad) + at;
        T* grad_in = static_cast<T*>(a.grad_in) + at;
        vectors(a.cols, [&](int64_t c, int left) {
          vf y;
          const vf g = Y::gradient(read(in + c, left), read(grad + c, left), y);
          write(grad_in + c, g, left);
          if constexpr (AGAIN) write(static_cast<T*>(a.out) + at + c, y, left);
          store(sum + c, load(sum + c) + g);
        });
      }
    }
  });
  for (int64_t c = 0; c < a.cols; c += W) {
    vf total{};
    for (int64_t unit = 0; unit < units; unit++) total += load(sums + unit * ld + c);
    write(a.column_sums + c, total, int(std::min<int64_t>(W, a.cols - c)));
  }
}

template <class Y, class T>
void gate_forward(const Gate& g) {
  parallel_units((g.rows + ROWS - 1) / ROWS, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;)
      for (int64_t row = unit * ROWS; row < std::min(g.rows, (unit + 1) * ROWS); row++) {
        const T *a = static_cast<const T*>(g.a) + row * g.ld, *b = static_cast<const T*>(g.b) + row * g.ld;
        T* out = static_cast<T*>(g.out) + row * g.cols;
        vectors(g.cols,
                [&](int64_t c, int left) { write(out + c, Y::value(read(a + c, left)) * read(b + c, left), left); });
      }
  });
}

template <class Y, class T>
void gate_backward(const Gate& g) {
  const int64_t units = (g.rows + ROWS - 1) / ROWS, ld = round_up(g.cols, W);
  float* sums = shared().take<float>(units * 2 * ld);  // of a unit: those of a, those of b
  parallel_units(units, [&](Queue& queue) {
    for (int64_t unit; (unit = queue.next()) >= 0;) {
      float *sum_a = sums + unit * 2 * ld, *sum_b = sum_a + ld;
      std::fill_n(sum_a, 2 * ld, 0.f);
      for (int64_t row = unit * ROWS; row < std::min(g.rows, (unit + 1) * ROWS); row++) {
        const T *a = static_cast<const T*>(g.a) + row * g.ld, *b = static_cast<const T*>(g.b) + row * g.ld,
                *grad = static_cast<const T*>(g.grad) + row * g.cols;
        T *grad_a = static_cast<T*>(g.grad_a) + row * g.grad_ld, *grad_b = static_cast<T*>(g.grad_b) + row * g.grad_ld,
          *out = static_cast<T*>(g.out) + row * g.cols;
        vectors(g.cols, [&](int64_t c, int left) {
          const vf value = read(b + c, left), d = read(grad + c, left);
          vf y;
          const vf of_a = Y::gradient(read(a + c, left), d * value, y), of_b = d * y;
          write(grad_a + c, of_a, left);
          write(grad_b + c, of_b, left);
          write(out + c, y * value, left);
          store(sum_a + c, load(sum_a + c) + of_a);
          store(sum_b + c, load(sum_b + c) + of_b);
        });
      }
    }
  });
  vectors(g.cols, [&](int64_t c, int left) {
    vf a{}, b{};
    for (int64_t unit = 0; unit < units; unit++) {
      a += load(sums + unit * 2 * ld + c);
      b += load(sums + unit * 2 * ld + ld + c);
    }
    write(g.sums_a + c, a, left);
    write(g.sums_b + c, b, left);
  });
}

template <class Y, class T>
void run(const Activation& a) {
  if (!a.grad) return forward<Y, T>(a);
  a.out ? backward<Y, T, true>(a) : backward<Y, T, false>(a);
}

template <class T>
void of_type(const Activation& a) {
  with_activation<sizeof(T) == 2>(a.kind, [&](auto y) { run<decltype(y), T>(a); });
}

template <class T>
void of_type(const Gate& g) {
  with_activation<sizeof(T) == 2>(
      g.kind, [&](auto y) { g.grad ? gate_backward<decltype(y), T>(g) : gate_forward<decltype(y), T>(g); });
}

}  // namespace

template <bool COARSE>
void activate(Activation::Kind kind, int64_t rows, int64_t cols, float* x, int64_t ld, const float* bias) {
  with_activation<COARSE>(kind, [&](auto y) {
    for (int64_t r = 0; r < rows; r++, x += ld)
      for (int64_t c = 0; c < cols; c += W) store(x + c, decltype(y)::value(load(x + c) + load(bias + c)));
  });
}
template void activate<false>(Activation::Kind, int64_t, int64_t, float*, int64_t, const float*);
template void activate<true>(Activation::Kind, int64_t, int64_t, float*, int64_t, const float*);

void activation(const Activation& a) {
  with_dtype(a.dtype, [&](auto t) { of_type<decltype(t)>(a); });
}

void gate(const Gate& g) {
  with_dtype(g.dtype, [&](auto t) { of_type<decltype(t)>(g); });
}

}  // namespace pyvit::PYVIT_ISA
