// Attention with a bias of the rows and columns of a grid of keys: pyvit/ops/decomposed_attention.py.
#include <tuple>

#include "attention_tensors.h"

namespace pyvit {
namespace {

// The arguments of a call, checked, and as the kernels take them.
struct GridCall {
  Tensor q, k, v, rel_h, rel_w;
  GridBias grid{};

  GridCall(const char* op, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& rel_h_,
           const Tensor& rel_w_)
      : q(q_), k(k_), v(v_), rel_h(rel_h_), rel_w(rel_w_) {
    const Checks checks(op);
    checks.attention(q, k, v, {});
    check_channels(checks, q, v);
    checks.parameter("rel_h", rel_h, q, {q.size(0), q.size(1), q.size(2), ANY});
    checks.parameter("rel_w", rel_w, q, {q.size(0), q.size(1), q.size(2), ANY});
    checks.that(rel_h.scalar_type() == rel_w.scalar_type(), "rel_w", "of the dtype of rel_h");
    checks.that(rel_h.size(3) > 0 && rel_w.size(3) > 0, "rel_h and rel_w", "of at least one row and column of keys");
    checks.that(rel_h.size(3) <= k.size(2) && rel_h.size(3) * rel_w.size(3) == k.size(2), "k",
                "of as many tokens as rel_h has rows times rel_w columns");
    q = rows(q);
    k = rows(k);
    v = rows(v);
    rel_h = rows(rel_h);
    rel_w = rows(rel_w);
    grid.rows = rel_h.data_ptr();
    grid.columns = rel_w.data_ptr();
    grid.dtype = dtype_of(rel_h);
    grid.height = rel_h.size(3);
    grid.width = rel_w.size(3);
    grid.rows_b = rel_h.stride(0);
    grid.rows_h = rel_h.stride(1);
    grid.rows_q = rel_h.stride(2);
    grid.columns_b = rel_w.stride(0);
    grid.columns_h = rel_w.stride(1);
    grid.columns_q = rel_w.stride(2);
  }

  Attention attention(const Tensor& out, const Tensor& lse, double scale) const {
    Attention a = attention_of(q, k, v, out, lse, {}, false, scale);
    a.grid = &grid;
    return a;
  }
};

std::tuple<Tensor, Tensor> decomposed_attention(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, double scale,
                                                std::string backend) {
  check_backend(backend);
  const GridCall call("decomposed_attention", q, k, v, rel_h, rel_w);
  Tensor out = make_heads(q, q.size(0), q.size(1), q.size(2), v.size(3));
  Tensor lse = make(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (q.numel()) kernels().attention(call.attention(out, lse, scale));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> decomposed_attention_backward(Tensor grad_out, Maybe grad_lse,
                                                                                 Tensor out, Tensor lse, Tensor q,
                                                                                 Tensor k, Tensor v, Tensor rel_h,
                                                                                 Tensor rel_w, double scale,
                                                                                 std::string backend) {
  check_backend(backend);
  const GridCall call("decomposed_attention_backward", q, k, v, rel_h, rel_w);
  Checks("decomposed_attention_backward").results(grad_out, grad_lse, out, lse, false, q, v, {}, false);
  out = rows(out);
  grad_out = rows(grad_out);
  lse = dense(lse);
  if (grad_lse) grad_lse = dense(*grad_lse);
  Tensor dq = heads_like(q), dk = heads_like(k), dv = heads_like(v);
  Tensor drows = make(rel_h, shape_of(rel_h)), dcolumns = make(rel_w, shape_of(rel_w));
  if (q.numel()) {
    AttentionGrad g = gradient_of(grad_out, grad_lse, dq, dk, dv);
    g.grad_rows = drows.data_ptr();
    g.grad_columns = dcolumns.data_ptr();
    kernels().attention_backward(call.attention(out, lse, scale), g);
  } else {
    for (Tensor* t : {&dq, &dk, &dv, &drows, &dcolumns}) torch::stable::zero_(*t);
  }
  return {dq, dk, dv, drows, dcolumns};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CPU, m) {
  m.impl("decomposed_attention", TORCH_BOX(&pyvit::decomposed_attention));
  m.impl("decomposed_attention_backward", TORCH_BOX(&pyvit::decomposed_attention_backward));
}
