// A tile of both networks' scores on the same prototypes, for the cross-entropy of a student's softmax with a
// teacher's: in the forward what it adds to the running sums, in the backward the student's derivatives. One sample at
// a time, whose teacher probabilities stay in cache for all crops of the student.
#include "parallel.h"
#include "softmax.h"

namespace pyvit::PYVIT_ISA {
namespace {

constexpr int TEACHERS = 2;  // that one pass over a row of the student's takes in: DINO's global crops

// One row of scores: (score - center) * scale, and padding that no maximum and no sum sees.
struct Row {
  const float *scores, *center;
  float scale;
  vf operator()(int64_t c, int n) const {
    const vf x = read(scores + c, n);
    const vf v = rounded((center ? x - read(center + c, n) : x) * scale);  // the same before every difference
    return n == W ? v : (first_lanes(n) ? v : set1(-INF));
  }
};
Row student_row(const Distillation& d, int64_t crop, int64_t row) {
  return {d.student + (crop * d.rows + row) * d.cols, nullptr, d.student_scale};
}
Row teacher_row(const Distillation& d, int64_t crop, int64_t row) {
  return {d.teacher + (crop * d.rows + row) * d.cols, d.center, d.teacher_scale};
}

inline vf exp_from(vf x, float top) { return exp2v((x - top) * LOG2E); }

// A running maximum and sum of exp(x - maximum).
struct Running {
  float &top, &total;
  float before = 0.f;

  Running(float& top, float& total) : top(top), total(total) {}
  // The larger maximum; to be followed by `add`.
  void raise(const Row& x, int64_t cols) {
    before = top;
    vf most = set1(top);
    vectors(cols, [&](int64_t c, int n) { most = vmax(most, x(c, n)); });
    top = reduce_max(most);
  }
  float fade() const { return std::exp(before - top); }
  void add(vf sum) { total = total * fade() + reduce_add(sum); }
};

// The student's sum of exponentials and its products with the exponentials of J teachers, `ld` apart.
template <int J>
inline void student_sums(const Row& x, int64_t cols, float top, const float* e, int64_t ld, vf& sum,
                         vf (&dot)[TEACHERS]) {
  vectors(cols, [&](int64_t c, int n) {
    const vf v = x(c, n);
    sum += exp_from(v, top);
    for (int j = 0; j < J; j++) dot[j] += (n == W ? v : keep_first(v, n)) * load(e + j * ld + c);
  });
}

void forward_row(const Distillation& d, int64_t r, float* e, float* fade) {
  const int64_t ld = round_up(d.cols, W);
  for (int64_t j = 0; j < d.t; j++) {
    const Row x = teacher_row(d, j, r);
    Running running(d.top_t[j * d.rows + r], d.total_t[j * d.rows + r]);
    running.raise(x, d.cols);
    vf sum{};
    vectors(d.cols, [&](int64_t c, int n) {
      const vf p = exp_from(x(c, n), running.top);
      sum += p;
      store(e + j * ld + c, p);
    });
    fade[j] = running.fade();
    running.add(sum);
  }
  for (int64_t i = 0; i < d.s; i++) {
    const Row x = student_row(d, i, r);
    Running running(d.top_s[i * d.rows + r], d.total_s[i * d.rows + r]);
    running.raise(x, d.cols);
    for (int64_t j = 0; j < d.t; j += TEACHERS) {
      vf sum{}, dot[TEACHERS] = {};
      const bool pair = j + 1 < d.t;
      (pair ? student_sums<2> : student_sums<1>)(x, d.cols, running.top, e + j * ld, ld, sum, dot);
      if (!j) running.add(sum);
      for (int64_t k = 0; k <= pair; k++) {
        float& cross = d.cross[(i * d.t + j + k) * d.rows + r];
        cross = cross * fade[j + k] + reduce_add(dot[k]);
      }
    }
  }
}

// probability of the student * sum of weights - sum of weight * probability of a teacher
template <class T>
void backward_row(const Distillation& d, const DistillationGrad& g, int64_t r, float* p) {
  const int64_t ld = round_up(d.cols, W);
  for (int64_t j = 0; j < d.t; j++) {
    const Row x = teacher_row(d, j, r);
    vectors(d.cols, [&](int64_t c, int n) { store(p + j * ld + c, exp_from(x(c, n), g.lse_t[j * d.rows + r])); });
  }
  for (int64_t i = 0; i < d.s; i++) {
    const Row x = student_row(d, i, r);
    const auto weight = [&](int64_t j) { return g.weights[(i * d.t + j) * d.rows + r]; };
    float all = 0.f;
    for (int64_t j = 0; j < d.t; j++) all += weight(j);
    T* out = static_cast<T*>(g.grad) + (i * d.rows + r) * d.cols;
    vectors(d.cols, [&](int64_t c, int n) {
      vf v = exp_from(x(c, n), g.lse_s[i * d.rows + r]) * all;
      for (int64_t j = 0; j < d.t; j++) v -= load(p + j * ld + c) * weight(j);
      write(out + c, v, n);
    });
  }
}

template <class F>
void each_row(const Distillation& d, const F& body) {
  parallel_units(d.rows, [&](Queue& queue) {
    Scratch& memory = scratch();
    float *e = memory.take<float>(d.t * round_up(d.cols, W)), *fade = memory.take<float>(d.t);
    for (int64_t r; (r = queue.next()) >= 0;) body(r, e, fade);
  });
}

}  // namespace

void distillation(const Distillation& d) {
  each_row(d, [&](int64_t r, float* e, float* fade) { forward_row(d, r, e, fade); });
}
void distillation_backward(const Distillation& d, const DistillationGrad& g) {
  each_row(d, [&](int64_t r, float* p, float*) {
    g.dtype == Dtype::bf16 ? backward_row<bf16>(d, g, r, p) : backward_row<float>(d, g, r, p);
  });
}

}  // namespace pyvit::PYVIT_ISA
