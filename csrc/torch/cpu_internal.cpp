// Internal operators that pyvit/ops is built on, on LibTorch's stable ABI: not public, but anyone can call torch.ops,
// so each checks what its kernel relies on.
#include "cpu_tensors.h"

#include <algorithm>

namespace pyvit {
namespace {

// activations

Activation activation_of(const Tensor& x, const std::string& name) {
  Activation a{};
  a.kind = activation_kind(name);
  a.cols = x.dim() ? x.size(x.dim() - 1) : 1;
  a.rows = a.cols ? x.numel() / a.cols : 0;
  a.dtype = dtype_of(x);
  a.in = x.data_ptr();
  return a;
}
void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      t.is_contiguous() && x.is_contiguous() && t.numel() == x.numel() && t.scalar_type() == x.scalar_type(),
      "pyvit: activation: ", name, " must be contiguous and of the shape and dtype of x, which must be contiguous too");
}

void activation(Tensor x, std::string name, Tensor out) {
  check_like(out, x, "out");
  Activation a = activation_of(x, name);
  a.out = out.data_ptr();
  if (x.numel()) kernels().activation(a);
}

Tensor activation_backward(Tensor grad, Tensor x, std::string name, Tensor grad_x, Maybe out) {
  check_like(grad, x, "grad");
  check_like(grad_x, x, "grad_x");
  if (out) check_like(*out, x, "out");
  Activation a = activation_of(x, name);
  Tensor sums = make(x, {a.cols}, ScalarType::Float);
  a.grad = grad.data_ptr();
  a.grad_in = grad_x.data_ptr();
  if (out) a.out = out->data_ptr();
  a.column_sums = data<float>(sums);
  if (x.numel()) {
    kernels().activation(a);
  } else {
    torch::stable::zero_(sums);
  }
  return sums;
}

// Of (rows, cols) a and b with contiguous rows, as far apart in both: halves of a matrix, or two of them.
Gate gate_of(const Tensor& a, const Tensor& b, const std::string& name) {
  const Checks checks("gate");
  checks.shape("a", a, {ANY, ANY});
  checks.shape("b", b, {a.size(0), a.size(1)});
  checks.as("b", b, a);
  Gate g{};
  g.kind = activation_kind(name);
  g.rows = a.size(0);
  g.cols = a.size(1);
  const auto fits = [&](const Tensor& t) {
    return (g.cols <= 1 || t.stride(1) == 1) && (g.rows <= 1 || t.stride(0) >= g.cols);
  };
  checks.that(fits(a) && fits(b) && (g.rows <= 1 || a.stride(0) == b.stride(0)), "a and b",
              "of contiguous rows, as far apart in both");
  g.ld = a.stride(0);
  g.dtype = dtype_of(a);
  g.a = a.data_ptr();
  g.b = b.data_ptr();
  return g;
}
void check_rows(const char* name, const Tensor& t, const Tensor& like) {
  const Checks checks("gate");
  checks.shape(name, t, {like.size(0), like.size(1)});
  checks.as(name, t, like);
  checks.that(t.is_contiguous(), name, "contiguous");
}

// out = y(a) * b
void gate(Tensor a, Tensor b, std::string name, Tensor out) {
  Gate g = gate_of(a, b, name);
  check_rows("out", out, a);
  g.out = out.data_ptr();
  if (out.numel()) kernels().gate(g);
}

// The gradients of a and b for `grad`, which becomes y(a) * b; the sums of their columns, (2, cols).
Tensor gate_backward(Tensor grad, Tensor a, Tensor b, std::string name, Tensor grad_a, Tensor grad_b) {
  Gate g = gate_of(a, b, name);
  check_rows("grad", grad, a);
  const Gate to = gate_of(grad_a, grad_b, name);
  Checks("gate").shape("grad_a", grad_a, {g.rows, g.cols});
  Checks("gate").as("grad_a", grad_a, a);
  Tensor sums = make(a, {2, g.cols}, ScalarType::Float);
  g.grad = grad.data_ptr();
  g.out = grad.data_ptr();
  g.grad_a = grad_a.data_ptr();
  g.grad_b = grad_b.data_ptr();
  g.grad_ld = to.ld;
  g.sums_a = data<float>(sums);
  g.sums_b = g.sums_a + g.cols;
  if (grad.numel()) {
    kernels().gate(g);
  } else {
    torch::stable::zero_(sums);
  }
  return sums;
}

// layer norm and RMS norm

RowNorm row_norm_of(const Tensor& x, const Tensor& y, const Maybe& weight, const Maybe& bias, double eps,
                    bool centered) {
  STD_TORCH_CHECK(
      x.dim() > 0 && x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel() &&
          (x.scalar_type() == y.scalar_type() || x.scalar_type() == ScalarType::Float),
      "pyvit: norm: x and its result must be contiguous, of one size, and x float32 if their dtypes differ");
  RowNorm a{};
  a.centered = centered;
  a.cols = x.size(x.dim() - 1);
  a.rows = a.cols ? x.numel() / a.cols : 0;
  a.in = dtype_of(x);
  a.out = dtype_of(y);
  const auto fits = [&](const Maybe& p) {
    return !p || (p->is_contiguous() && p->numel() == a.cols && (!weight || p->scalar_type() == weight->scalar_type()));
  };
  STD_TORCH_CHECK(fits(weight) && fits(bias) && (centered || !bias),
                  "pyvit: norm: weight and bias must be contiguous, of ", a.cols,
                  " elements and one dtype; RMS norm has no bias");
  if (weight || bias) a.parameters = dtype_of(weight ? *weight : *bias);
  a.x = x.data_ptr();
  a.weight = data<char>(weight);
  a.bias = data<char>(bias);
  a.eps = float(eps);
  return a;
}
// Of layer norm means, then reciprocal deviations, (2, rows); of RMS norm reciprocal root mean squares, (rows,).
void set_statistics(RowNorm& a, const Tensor& statistics) {
  float* p = vector(statistics, (a.centered ? 2 : 1) * a.rows, "statistics");
  a.mean = a.centered ? p : nullptr;
  a.rstd = a.centered ? p + a.rows : p;
}

void norm_out(Tensor x, Maybe weight, Maybe bias, double eps, bool centered, Tensor out, Maybe statistics) {
  RowNorm a = row_norm_of(x, out, weight, bias, eps, centered);
  a.y = out.data_ptr();
  if (statistics) set_statistics(a, *statistics);
  if (x.numel()) kernels().row_norm(a);
}

void norm_backward_out(Tensor grad, Tensor x, Maybe weight, Tensor statistics, bool centered, Tensor grad_x,
                       Maybe grad_parameters) {
  RowNorm a = row_norm_of(x, grad, weight, std::nullopt, 0, centered);
  set_statistics(a, statistics);
  STD_TORCH_CHECK(grad_x.is_contiguous() && grad_x.numel() == x.numel() && grad_x.scalar_type() == x.scalar_type(),
                  "pyvit: norm: grad_x must be as x is");
  RowNormGrad g{grad.data_ptr(), grad_x.data_ptr(), nullptr, nullptr};
  if (grad_parameters) {
    g.grad_weight = vector(*grad_parameters, (centered ? 2 : 1) * a.cols, "grad_parameters");
    if (centered) g.grad_bias = g.grad_weight + a.cols;
  }
  if (x.numel()) {
    kernels().row_norm_backward(a, g);
  } else if (grad_parameters) {
    torch::stable::zero_(*grad_parameters);
  }
}

// products

Operand operand_of(const Tensor& t) {
  const bool rows = t.size(1) <= 1 || t.stride(1) == 1;
  STD_TORCH_CHECK(rows || t.size(0) <= 1 || t.stride(0) == 1,
                  "pyvit: product: the rows or the columns of a and b must be contiguous");
  Operand o{};
  o.data = t.data_ptr();
  o.ld = t.stride(rows ? 0 : 1);
  o.column_major = !rows;
  return o;
}

// out (n, m) = or, with `add`, += a (n, k) b (k, m) + bias
void product(Tensor a, Tensor b, Maybe bias, Tensor out, bool add) {
  const auto narrow_or_wide = [&](const Tensor& t) {
    return t.scalar_type() == a.scalar_type() || t.scalar_type() == ScalarType::Float;
  };
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && narrow_or_wide(b),
                  "pyvit: product: a and b must be matrices that fit each other, b of the dtype of a or float32");
  const int64_t n = a.size(0), m = b.size(1), k = a.size(1);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == n && out.size(1) == m && (m <= 1 || out.stride(1) == 1) &&
                      (n <= 1 || out.stride(0) >= m) && narrow_or_wide(out) &&
                      (!add || out.scalar_type() == ScalarType::Float),
                  "pyvit: product: out must be of shape (", n, ", ", m,
                  ") with contiguous rows, float32 or, if not added to, of the dtype of a");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == m && bias->scalar_type() == b.scalar_type()),
                  "pyvit: product: a bias must be contiguous, of the dtype of b and of ", m, " elements");
  Product p{};
  p.n = n;
  p.m = m;
  p.k = k;
  p.dtype = dtype_of(a);
  p.a = operand_of(a);
  p.b = operand_of(b);
  p.b_dtype = dtype_of(b);
  p.bias = data(bias);
  p.out = out.data_ptr();
  p.out_dtype = dtype_of(out);
  p.ldo = out.stride(0);
  p.add = add;
  if (out.numel()) kernels().product(p);
}

// layout

void transposed(Tensor x, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "pyvit: transposed: x must be a contiguous matrix");
  const int64_t rows = x.size(0), cols = x.size(1);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == cols && out.size(1) == rows && out.is_contiguous() &&
                      out.scalar_type() == x.scalar_type(),
                  "pyvit: transposed: out must be contiguous, of the dtype of x and of its shape reversed");
  Transposition t{};
  t.rows = rows;
  t.cols = cols;
  t.bytes = dtype_of(x) == Dtype::f32 ? 4 : 2;
  t.in = x.data_ptr();
  t.out = out.data_ptr();
  kernels().transpose(t);
}

// streaming losses: the tile of scores is contiguous float32, the rest float32 vectors of its rows or columns

void log_sum_exp(Tensor scores, int64_t dim, Tensor top, Tensor total) {
  const Checks checks("log_sum_exp");
  checks.shape("scores", scores, {ANY, ANY});
  checks.that(dim == 0 || dim == 1, "dim", "0 or 1");
  TileScores t{};
  t.rows = scores.size(0);
  t.cols = scores.size(1);
  t.of_rows = dim == 1;
  const int64_t n = t.of_rows ? t.rows : t.cols;
  t.scores = vector(scores, t.rows * t.cols, "scores");
  t.top = vector(top, n, "top");
  t.total = vector(total, n, "total");
  if (scores.numel()) kernels().log_sum_exp(t);
}

Distillation distillation_of(const Tensor& student, const Tensor& teacher, const Maybe& center, double student_temp,
                             double teacher_temp) {
  const Checks checks("distillation_tile");
  checks.shape("student", student, {ANY, ANY, ANY});
  checks.shape("teacher", teacher, {ANY, student.size(1), student.size(2)});
  checks.that(student_temp > 0 && teacher_temp > 0, "student_temp and teacher_temp", "positive");
  Distillation d{};
  d.s = student.size(0);
  d.t = teacher.size(0);
  d.rows = student.size(1);
  d.cols = student.size(2);
  d.student = vector(student, d.s * d.rows * d.cols, "student");
  d.teacher = vector(teacher, d.t * d.rows * d.cols, "teacher");
  if (center) d.center = vector(*center, d.cols, "center");
  d.student_scale = float(1 / student_temp);
  d.teacher_scale = float(1 / teacher_temp);
  return d;
}

void distillation_tile(Tensor student, Tensor teacher, Maybe center, double student_temp, double teacher_temp,
                       Tensor top_s, Tensor total_s, Tensor top_t, Tensor total_t, Tensor cross) {
  Distillation d = distillation_of(student, teacher, center, student_temp, teacher_temp);
  d.top_s = vector(top_s, d.s * d.rows, "top_s");
  d.total_s = vector(total_s, d.s * d.rows, "total_s");
  d.top_t = vector(top_t, d.t * d.rows, "top_t");
  d.total_t = vector(total_t, d.t * d.rows, "total_t");
  d.cross = vector(cross, d.s * d.t * d.rows, "cross");
  kernels().distillation(d);
}

void distillation_tile_backward(Tensor student, Tensor teacher, Maybe center, double student_temp, double teacher_temp,
                                Tensor lse_s, Tensor lse_t, Tensor weights, Tensor grad) {
  const Distillation d = distillation_of(student, teacher, center, student_temp, teacher_temp);
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == student.numel() &&
                      (grad.scalar_type() == ScalarType::Float || grad.scalar_type() == ScalarType::BFloat16),
                  "pyvit: grad must be contiguous float32 or bfloat16 numbers, as many as student's");
  DistillationGrad g{};
  g.lse_s = vector(lse_s, d.s * d.rows, "lse_s");
  g.lse_t = vector(lse_t, d.t * d.rows, "lse_t");
  g.weights = vector(weights, d.s * d.t * d.rows, "weights");
  g.dtype = dtype_of(grad);
  g.grad = grad.data_ptr();
  kernels().distillation_backward(d, g);
}

// losses over all pairs of rows: one call for the rows of a and those of b, added to the caller's sums in place

// Both with contiguous rows; with `own`, b is a.
void pair_rows(Tensor& a, Tensor& b, bool own) {
  const Checks checks("pairs");
  checks.shape("a", a, {ANY, ANY});
  checks.shape("b", b, {ANY, a.size(1)});
  checks.that(!own || (a.data_ptr() == b.data_ptr() && a.numel() == b.numel()), "b", "a itself with own");
  a = rows(a);
  b = own ? a : rows(b);
}

Pairs pairs_of(const Tensor& a, const Tensor& b, bool own, int64_t shift, double scale) {
  const Checks checks("pairs");
  checks.as("b", b, a);
  checks.that(shift >= -1 && shift < std::max<int64_t>(b.size(0), 1), "shift", "-1 or an index of b's rows");
  Pairs p{};
  p.n = a.size(0);
  p.m = b.size(0);
  p.d = a.size(1);
  p.dtype = dtype_of(a);
  p.a = a.data_ptr();
  p.b = b.data_ptr();
  p.lda = a.stride(0);
  p.ldb = b.stride(0);
  p.own = own;
  p.shift = shift;
  p.scale = float(scale);
  return p;
}

float* gradient(const Maybe& t, const Pairs& p, int64_t n) {
  STD_TORCH_CHECK(!t || (t->defined() && t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2 &&
                         t->size(0) == n && t->size(1) == (p.d + 15) / 16 * 16),
                  "pyvit: gradients over pairs must be contiguous float32, rows padded to 16");
  return data<float>(t);
}
PairsGrad pair_gradients(const Pairs& p, const Tensor& grad_a, const Maybe& grad_b) {
  PairsGrad g{};
  g.grad_a = gradient(grad_a, p, p.n);
  g.grad_b = gradient(grad_b, p, p.m);
  g.ld = grad_a.size(1);
  return g;
}

Tensor pair_softmax(Tensor a, Tensor b, bool own, double scale, Tensor top_a, Tensor total_a, Maybe top_b,
                    Maybe total_b) {
  pair_rows(a, b, own);
  Pairs p = pairs_of(a, b, own, -1, scale);
  Checks("pairs").that(top_b.has_value() == total_b.has_value() && !(own && top_b), "top_b and total_b",
                       "given together, and not with own");
  p.top_a = vector(top_a, p.n, "top_a");
  p.total_a = vector(total_a, p.n, "total_a");
  p.top_b = own ? p.top_a : top_b ? vector(*top_b, p.m, "top_b") : nullptr;
  p.total_b = own ? p.total_a : total_b ? vector(*total_b, p.m, "total_b") : nullptr;
  kernels().pairs(p);
  return total_a;
}

Tensor pair_softmax_backward(Tensor a, Tensor b, bool own, int64_t shift, double scale, Tensor lse_a, Tensor lse_b,
                             Tensor grad_a, Maybe grad_b) {
  pair_rows(a, b, own);
  const Pairs p = pairs_of(a, b, own, shift, scale);
  Checks("pairs").that(!(own && grad_b), "grad_b", "None with own");
  PairsGrad g = pair_gradients(p, grad_a, grad_b);
  g.lse_a = vector(lse_a, p.n, "lse_a");
  g.lse_b = vector(lse_b, p.m, "lse_b");
  if (own) g.grad_b = g.grad_a;
  kernels().pairs_backward(p, g);
  return grad_a;
}

Pairs sigmoid_pairs(const Tensor& a, const Tensor& b, int64_t shift, double scale, double bias, const Tensor& total) {
  Pairs p = pairs_of(a, b, false, shift, scale);
  p.sigmoid = true;
  p.bias = float(bias);
  p.total_a = vector(total, p.n, "total");
  return p;
}

Tensor pair_sigmoid(Tensor a, Tensor b, int64_t shift, double scale, double bias, Tensor total) {
  pair_rows(a, b, false);
  kernels().pairs(sigmoid_pairs(a, b, shift, scale, bias, total));
  return total;
}

Tensor pair_sigmoid_backward(Tensor a, Tensor b, int64_t shift, double scale, double bias, Tensor total, Tensor grad_a,
                             Tensor grad_b) {
  pair_rows(a, b, false);
  const Pairs p = sigmoid_pairs(a, b, shift, scale, bias, total);
  kernels().pairs_backward(p, pair_gradients(p, grad_a, grad_b));
  return total;
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_FRAGMENT(PYVIT_NAMESPACE, m) {
  // In place of out and grad_x, for pyvit/ops/activations.py: rows of x (..., C); returns the sums of grad_x's columns.
  m.def("activation(Tensor x, str name, Tensor(a!) out) -> ()");
  m.def("activation_backward(Tensor grad, Tensor x, str name, Tensor(a!) grad_x, Tensor(b!)? out) -> Tensor");
  // a, b (rows, cols): halves of one matrix or two of them; out y(a) * b, which takes the place of grad; returns the
  // sums of grad_a's and grad_b's columns.
  m.def("gate(Tensor a, Tensor b, str name, Tensor(a!) out) -> ()");
  m.def("gate_backward(Tensor(a!) grad, Tensor a, Tensor b, str name, Tensor(b!) grad_a, Tensor(c!) grad_b) -> Tensor");
  // For pyvit/ops/row_norm.py. statistics (2, rows) or, of RMS norm, (1, rows), grad_parameters (2, C) or (1, C):
  // float32.
  m.def(
      "_norm_out(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, Tensor(a!) out, "
      "Tensor(b!)? statistics) -> ()");
  m.def(
      "_norm_backward_out(Tensor grad, Tensor x, Tensor? weight, Tensor statistics, bool centered, "
      "Tensor(a!) grad_x, Tensor(b!)? grad_parameters) -> ()");
  // For pyvit/ops/matmul.py and loss_tiles.py.
  m.def("transposed(Tensor x, Tensor(a!) out) -> ()");
  m.def("product(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, bool add) -> ()");
  // For pyvit/ops/loss_tiles.py.
  m.def("log_sum_exp(Tensor scores, int dim, Tensor(a!) top, Tensor(b!) total) -> ()");
  // For pyvit/ops/distillation_cross_entropy.py. Scores (crops, N, K), lse, tops and totals (crops, N), cross and
  // weights (S, T, N).
  m.def(
      "distillation_tile(Tensor student, Tensor teacher, Tensor? center, float student_temp, float teacher_temp, "
      "Tensor(a!) top_s, Tensor(b!) total_s, Tensor(c!) top_t, Tensor(d!) total_t, Tensor(e!) cross) -> ()");
  m.def(
      "distillation_tile_backward(Tensor student, Tensor teacher, Tensor? center, float student_temp, "
      "float teacher_temp, Tensor lse_s, Tensor lse_t, Tensor weights, Tensor(a!) grad) -> ()");
  // For pyvit/ops/pairwise_losses.py.
  m.def(
      "pair_softmax(Tensor a, Tensor b, bool own, float scale, Tensor(a!) top_a, Tensor(b!) total_a, "
      "Tensor(c!)? top_b, Tensor(d!)? total_b) -> Tensor(b!)");
  m.def(
      "pair_softmax_backward(Tensor a, Tensor b, bool own, int shift, float scale, Tensor lse_a, Tensor lse_b, "
      "Tensor(a!) grad_a, Tensor(b!)? grad_b) -> Tensor(a!)");
  m.def("pair_sigmoid(Tensor a, Tensor b, int shift, float scale, float bias, Tensor(a!) total) -> Tensor(a!)");
  m.def(
      "pair_sigmoid_backward(Tensor a, Tensor b, int shift, float scale, float bias, Tensor(a!) total, "
      "Tensor(b!) grad_a, Tensor(c!) grad_b) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CPU, m) {
  m.impl("transposed", TORCH_BOX(&pyvit::transposed));
  m.impl("product", TORCH_BOX(&pyvit::product));
  m.impl("log_sum_exp", TORCH_BOX(&pyvit::log_sum_exp));
  m.impl("distillation_tile", TORCH_BOX(&pyvit::distillation_tile));
  m.impl("distillation_tile_backward", TORCH_BOX(&pyvit::distillation_tile_backward));
  m.impl("activation", TORCH_BOX(&pyvit::activation));
  m.impl("activation_backward", TORCH_BOX(&pyvit::activation_backward));
  m.impl("gate", TORCH_BOX(&pyvit::gate));
  m.impl("gate_backward", TORCH_BOX(&pyvit::gate_backward));
  m.impl("_norm_out", TORCH_BOX(&pyvit::norm_out));
  m.impl("_norm_backward_out", TORCH_BOX(&pyvit::norm_backward_out));
  m.impl("pair_softmax", TORCH_BOX(&pyvit::pair_softmax));
  m.impl("pair_softmax_backward", TORCH_BOX(&pyvit::pair_softmax_backward));
  m.impl("pair_sigmoid", TORCH_BOX(&pyvit::pair_sigmoid));
  m.impl("pair_sigmoid_backward", TORCH_BOX(&pyvit::pair_sigmoid_backward));
}
