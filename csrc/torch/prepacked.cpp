// Inference with prepacked weights: linear layers, and whole residual branches in one call. For pyvit/ops/prepacked.py,
// and with int8 weights for pyvit/ops/linear_int8.py.
#include <algorithm>
#include <cmath>

#include "packed_weight.h"
#include "recycled.h"

namespace pyvit {
namespace {

bool is_int8(const Tensor& weight) { return weight.scalar_type() == ScalarType::Char; }

// Words of a weight whose rows are packed in `parts` equal parts, one after another: 2 for a gate's and its values.
int64_t packed_size(const Tensor& weight, int64_t parts = 1) {
  constexpr int64_t MANY = int64_t(1) << 48;  // whatever is computed of fewer elements does not overflow
  STD_TORCH_CHECK(weight.numel() <= MANY, "pyvit: prepacked weights: weight must have fewer elements");
  if (is_int8(weight)) {
    constexpr int64_t MANY_PRODUCTS = 65536;  // of 255 x 127, whose sum is below 2^31
    STD_TORCH_CHECK(weight.size(1) <= MANY_PRODUCTS, "pyvit: int8 weights: weight must have at most ", MANY_PRODUCTS,
                    " columns");
    return int8_kernels().packed_words(weight.size(1), weight.size(0));
  }
  return parts * kernels().packed_layer_size(weight.size(1), weight.size(0) / parts, dtype_of(weight));
}

void check_parts(const Tensor& weight, int64_t parts) {
  STD_TORCH_CHECK(parts == 1 || (parts == 2 && weight.size(0) % 2 == 0 && !is_int8(weight)),
                  "pyvit: prepacked weights: parts must be 1, or 2 for a float weight with an even number of rows");
}

const uint32_t* packed_words(const Tensor& weight, const Tensor& packed, int64_t parts = 1) {
  check_weight(weight);
  check_parts(weight, parts);
  STD_TORCH_CHECK(packed.defined() && packed.is_cpu() && packed.scalar_type() == ScalarType::Int &&
                      packed.is_contiguous() && packed.numel() == HEADER + packed_size(weight, parts),
                  "pyvit: prepacked weights: packed must be of a weight of this shape and dtype, in as many parts");
  uint32_t* words = static_cast<uint32_t*>(packed.data_ptr());
  renew(weight, words, [&] {
    if (is_int8(weight))
      return int8_kernels().pack(data<int8_t>(weight), weight.size(1), weight.size(0), words + HEADER);
    const int64_t rows = weight.size(0) / parts, in = weight.size(1);
    for (int64_t part = 0; part < parts; part++)
      kernels().pack_layer(data<char>(weight) + part * rows * in * weight.element_size(), in, rows, dtype_of(weight),
                           words + HEADER + part * (packed_size(weight, parts) / parts));
  });
  return words + HEADER;
}

// weight (out, in) in the order in which it is multiplied, behind a header: 32-bit words, of no meaning elsewhere.
Tensor prepack_weight(Tensor weight, int64_t parts) {
  check_weight(weight);
  check_parts(weight, parts);
  Tensor packed = make(weight, {HEADER + packed_size(weight, parts)}, ScalarType::Int);
  in_large_pages(packed);
  std::memset(packed.data_ptr(), 0, HEADER * 4);
  packed_words(weight, packed, parts);
  return packed;
}

// A header alone, for another library's packed form.
Tensor prepack_header(Tensor weight) {
  check_weight(weight);
  Tensor header = make(weight, {HEADER}, ScalarType::Int);
  std::memset(header.data_ptr(), 0, HEADER * 4);
  renew(weight, header.data_ptr(), [] {});
  return header;
}

// Whether the weight is still what it was at the last call with this header, which afterwards tells of it as it is now.
bool is_prepacked(Tensor weight, Tensor header) {
  check_weight(weight);
  STD_TORCH_CHECK(
      header.is_cpu() && header.scalar_type() == ScalarType::Int && header.is_contiguous() && header.numel() == HEADER,
      "pyvit: is_prepacked: header must be ", HEADER, " contiguous int32 numbers");
  return !renew(weight, header.data_ptr(), [] {});
}

// Which norm comes before a layer.
enum NormKind : int64_t { NO_NORM, LAYER_NORM, RMS_NORM };
struct Norm {
  int64_t kind = NO_NORM;
  Maybe weight = {}, bias = {};
  double eps = 0;
};
// What stands around the linear layers of a residual branch. Null: residual 0, scale 1.
struct Around {
  int64_t norm;
  Maybe norm_weight, norm_bias;
  double eps;
  Maybe scale, residual;
};
// An int8 weight has a scale for each of its rows.
struct Weight {
  Tensor weight, packed;
  Maybe bias, scale;
};

void check_vector(const char* op, const char* name, Maybe& t, int64_t n, const Tensor& like) {
  if (!t) return;
  const Checks checks(op);
  checks.shape(name, *t, {n});
  checks.as(name, *t, like);
  t = dense(*t);
}

Layer layer_of(const char* op, const char* name, const Tensor& x, int64_t in, Weight& w) {
  const Checks checks(op);
  checks.shape(name, w.weight, {ANY, in});
  if (w.scale) {
    checks.dtype(name, w.weight, {ScalarType::Char}, "int8");
    checks.device(name, w.weight, x);
    checks.numbers("the scale of a weight", *w.scale, x, {w.weight.size(0)});
    w.scale = dense(w.scale);
  } else {
    checks.as(name, w.weight, x);
  }
  check_vector(op, "bias", w.bias, w.weight.size(0), x);
  return {packed_words(w.weight, w.packed), data<char>(w.bias), in, w.weight.size(0)};
}

// `norm` of rows of n, whose parameters it keeps alive.
FusedNorm norm_of(const char* op, const std::string& name, const Tensor& x, int64_t n, Norm& norm) {
  const Checks checks(op);
  FusedNorm a{};
  checks.that(norm.kind >= NO_NORM && norm.kind <= RMS_NORM, name.c_str(), "0 (none), 1 (layer norm) or 2 (RMS norm)");
  a.given = norm.kind != NO_NORM;
  a.rms = norm.kind == RMS_NORM;
  checks.that(!a.rms || !norm.bias, (name + " bias").c_str(), "None for an RMS norm");
  for (const auto& [part, t] : {std::pair<const char*, Maybe*>(" weight", &norm.weight), {" bias", &norm.bias}}) {
    if (!*t) continue;
    checks.parameter((name + part).c_str(), *t, x, {n});
    *t = dense(**t);
    a.dtype = dtype_of(**t);
  }
  checks.that(!norm.weight || !norm.bias || norm.weight->scalar_type() == norm.bias->scalar_type(),
              (name + " bias").c_str(), ("of the dtype of " + name + " weight").c_str());
  a.weight = data<char>(norm.weight);
  a.bias = data<char>(norm.bias);
  a.eps = float(norm.eps);
  return a;
}

// The two halves of a packed weight and its bias.
void split_layer(const char* op, const Tensor& x, int64_t in, Weight& w, bool gate_last, Layer& values, Layer& gate) {
  const Checks checks(op);
  checks.shape("weight", w.weight, {ANY, in});
  checks.as("weight", w.weight, x);
  checks.that(w.weight.size(0) % 2 == 0, "weight", "of an even number of rows, the gate's and the values'");
  check_vector(op, "bias", w.bias, w.weight.size(0), x);
  const int64_t out = w.weight.size(0) / 2;
  const uint32_t* words = packed_words(w.weight, w.packed, 2);
  const char* bias = data<char>(w.bias);
  const Layer half{words, bias, in, out},
      other{words + packed_size(w.weight, 2) / 2, bias ? bias + out * x.element_size() : nullptr, in, out};
  gate = gate_last ? other : half;
  values = gate_last ? half : other;
}

// Of a gated MLP: the gate's layer, null where it is a half of the first weight, the last one or not; the norm of the
// hidden layer.
struct Gated {
  std::optional<Weight> gate;
  bool gate_last;
  Norm norm;
};

// residual + scale * second(activation(first(norm(x)))), or without `second` one layer, the activation behind it.
Tensor fused_linear(const char* op, Tensor x, Around around, Weight first, const std::string& activation,
                    std::optional<Weight> second, std::optional<Gated> gated = {}) {
  const Checks checks(op);
  checks.that(x.defined() && x.dim() > 0 && x.is_cpu(), "x", "a CPU tensor with a last dimension");
  x = dense(x);
  Ints shape = shape_of(x);
  const int64_t in = shape.back();
  FusedLinear a{};
  a.rows = in ? x.numel() / in : 0;
  a.dtype = dtype_of(x);
  a.x = x.data_ptr();
  Norm norm{around.norm, around.norm_weight, around.norm_bias, around.eps};
  a.norm = norm_of(op, "norm", x, in, norm);
  checks.that(!first.scale || !a.norm.rms, "norm", "no RMS norm before an int8 weight");
  if (gated && !gated->gate) {
    split_layer(op, x, in, first, gated->gate_last, a.first, a.gate);
  } else {
    a.first = layer_of(op, "weight", x, in, first);
  }
  if (gated && gated->gate) {
    a.gate = layer_of(op, "gate weight", x, in, *gated->gate);
    checks.that(a.gate.out == a.first.out, "gate weight", "of as many rows as the weight of the values");
  }
  if (gated) a.hidden_norm = norm_of(op, "hidden norm", x, a.first.out, gated->norm);
  if (second) a.second = layer_of(op, "second weight", x, a.first.out, *second);
  if (!activation.empty()) {
    a.activated = true;
    a.activation = activation_kind(activation);
  }
  shape.back() = second ? a.second.out : a.first.out;
  check_vector(op, "scale", around.scale, shape.back(), x);
  if (around.residual) {
    const Shape have = around.residual->sizes();
    checks.that(Ints(have.begin(), have.end()) == shape, "residual", "of the shape of the result");
    checks.as("residual", *around.residual, x);
    around.residual = dense(*around.residual);
  }
  a.scale = data<char>(around.scale);
  a.residual = data<char>(around.residual);
  Tensor out = make_recycled(x, shape);
  a.out = out.data_ptr();
  if (!out.numel()) return out;
  if (first.scale) {
    int8_kernels().fused_linear({a, data<float>(first.scale), second ? data<float>(second->scale) : nullptr});
  } else {
    kernels().fused_linear(a);
  }
  return out;
}

Tensor prepacked_mlp(Tensor x, int64_t norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor weight,
                     Tensor packed, Maybe bias, std::string activation, Maybe weight2, Maybe packed2, Maybe bias2,
                     Maybe scale, Maybe residual) {
  std::optional<Weight> second;
  Checks("mlp").that(weight2.has_value() == packed2.has_value(), "weight2 and packed2", "given together");
  if (weight2) second = Weight{*weight2, *packed2, bias2, {}};
  return fused_linear(second ? "mlp" : "linear", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                      {weight, packed, bias, {}}, activation, second);
}

Tensor prepacked_gated_mlp(Tensor x, int64_t norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor weight,
                           Tensor packed, Maybe bias, Maybe gate_weight, Maybe gate_packed, Maybe gate_bias,
                           bool gate_last, std::string activation, int64_t hidden_norm, Maybe hidden_norm_weight,
                           Maybe hidden_norm_bias, double hidden_eps, Tensor weight2, Tensor packed2, Maybe bias2,
                           Maybe scale, Maybe residual) {
  const Checks checks("gated_mlp");
  checks.that(gate_weight.has_value() == gate_packed.has_value() && (gate_weight || !gate_bias),
              "gate_weight and gate_packed", "given together");
  checks.that(!activation.empty(), "activation", "an activation's name");
  Gated gated{{}, gate_last, {hidden_norm, hidden_norm_weight, hidden_norm_bias, hidden_eps}};
  if (gate_weight) gated.gate = Weight{*gate_weight, *gate_packed, gate_bias, {}};
  return fused_linear("gated_mlp", x, {norm, norm_weight, norm_bias, eps, scale, residual}, {weight, packed, bias, {}},
                      activation, Weight{weight2, packed2, bias2, {}}, gated);
}

// residual + scale * proj(attention(qkv(norm(x)))), x (B, N, C)
Tensor attention_branch(const char* op, Tensor x, const Around& around, const Weight& qkv_layer, int64_t num_heads,
                        bool is_causal, const Weight& proj) {
  const Checks checks(op);
  checks.shape("x", x, {ANY, ANY, ANY});
  // (B, N, 3C), channels (3, heads, d)
  Tensor qkv =
      fused_linear(op, x, {around.norm, around.norm_weight, around.norm_bias, around.eps, {}, {}}, qkv_layer, "", {});
  const int64_t b = qkv.size(0), n = qkv.size(1), channels = qkv.size(2) / 3;
  checks.that(
      num_heads > 0 && channels > 0 && qkv.size(2) % 3 == 0 && channels % num_heads == 0 && channels / num_heads <= 256,
      "num_heads", "a divisor of a third of qkv's channels, of at most 256 channels per head");
  const int64_t d = channels / num_heads, bytes = qkv.element_size();
  Tensor out = make_recycled(qkv, {b, n, channels});
  Tensor lse = make(qkv, {b, num_heads, n}, ScalarType::Float);
  if (qkv.numel()) {
    const auto part = [&](int64_t i) {
      return Tokens{static_cast<char*>(qkv.data_ptr()) + i * channels * bytes, n * 3 * channels, d, 3 * channels};
    };
    Attention a{};
    a.batch = b;
    a.heads = a.kv_heads = num_heads;
    a.nq = a.nk = n;
    a.d = a.dv = d;
    a.dtype = dtype_of(qkv);
    a.q = part(0);
    a.k = part(1);
    a.v = part(2);
    a.out = {out.data_ptr(), n * channels, d, channels};
    a.causal = is_causal;
    a.scale = float(1 / std::sqrt(double(d)));
    a.lse = static_cast<float*>(lse.data_ptr());
    a.lse_b = num_heads * n;
    a.lse_h = n;
    kernels().attention(a);
  }
  qkv = Tensor();  // whose memory the result may take
  return fused_linear(op, out, {false, {}, {}, 0, around.scale, around.residual}, proj, "", {});
}

Tensor prepacked_attention(Tensor x, int64_t norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor qkv_weight,
                           Tensor qkv_packed, Maybe qkv_bias, int64_t num_heads, bool is_causal, Tensor proj_weight,
                           Tensor proj_packed, Maybe proj_bias, Maybe scale, Maybe residual) {
  return attention_branch("attention", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                          {qkv_weight, qkv_packed, qkv_bias, {}}, num_heads, is_causal,
                          {proj_weight, proj_packed, proj_bias, {}});
}

// residual + scale * proj(window_attention(qkv(norm(x)))), x (B, H, W, C). Padding holds the bias of qkv, or is masked.
Tensor window_attention_branch(const char* op, Tensor x, const Around& around, const Weight& qkv_layer,
                               const Ints& window_size, const Ints& shift_size, int64_t num_heads, Maybe bias_table,
                               bool mask_padding, const Weight& proj) {
  const Checks checks(op);
  checks.shape("x", x, {ANY, ANY, ANY, ANY});
  Tensor qkv = fused_linear(op, x, {around.norm, around.norm_weight, around.norm_bias, around.eps, {}, {}}, qkv_layer,
                            "", {});  // (B, H, W, 3C)
  checks.window(qkv, window_size, shift_size, num_heads, bias_table, {}, {});
  const int64_t b = qkv.size(0), h = qkv.size(1), w = qkv.size(2), channels = qkv.size(3) / 3;
  const int64_t wh = window_size[0], ww = window_size[1], down = (h + wh - 1) / wh, across = (w + ww - 1) / ww;
  bias_table = parameter(bias_table);
  Maybe pad;
  if (!mask_padding && (h % wh || w % ww))
    pad = qkv_layer.bias ? parameter(qkv_layer.bias) : Maybe(zeros(qkv, {3 * channels}, ScalarType::Float));
  Tensor out = make_recycled(qkv, {b, h, w, channels});
  Tensor lse = make(qkv, {b, down * across, num_heads, wh * ww}, ScalarType::Float);
  if (qkv.numel()) {
    Window a{};
    a.batch = b;
    a.height = h;
    a.width = w;
    a.heads = num_heads;
    a.d = channels / num_heads;
    a.wh = wh;
    a.ww = ww;
    a.sy = shift_size[0];
    a.sx = shift_size[1];
    a.dtype = dtype_of(qkv);
    a.qkv = {qkv.data_ptr(), h * w * 3 * channels, w * 3 * channels, 3 * channels};
    a.out = {out.data_ptr(), h * w * channels, w * channels, channels};
    a.table = data<float>(bias_table);
    a.pad = data<float>(pad);
    a.scale = float(1 / std::sqrt(double(a.d)));
    a.lse = static_cast<float*>(lse.data_ptr());
    kernels().window(a);
  }
  qkv = Tensor();
  return fused_linear(op, out, {false, {}, {}, 0, around.scale, around.residual}, proj, "", {});
}

Tensor prepacked_window_attention(Tensor x, int64_t norm, Maybe norm_weight, Maybe norm_bias, double eps,
                                  Tensor qkv_weight, Tensor qkv_packed, Maybe qkv_bias, Ints window_size,
                                  Ints shift_size, int64_t num_heads, Maybe bias_table, bool mask_padding,
                                  Tensor proj_weight, Tensor proj_packed, Maybe proj_bias, Maybe scale,
                                  Maybe residual) {
  return window_attention_branch("window_attention", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                                 {qkv_weight, qkv_packed, qkv_bias, {}}, window_size, shift_size, num_heads, bias_table,
                                 mask_padding, {proj_weight, proj_packed, proj_bias, {}});
}

// The same with int8 weights.

Tensor int8_pack(Tensor weight) {
  STD_TORCH_CHECK(weight.defined() && is_int8(weight), "pyvit: int8_pack: weight must be int8");
  return prepack_weight(weight, 1);
}

Tensor linear_int8(Tensor x, bool norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor weight, Tensor packed,
                   Tensor weight_scale, Maybe bias, std::string activation, Maybe scale, Maybe residual) {
  return fused_linear("linear_int8", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                      {weight, packed, bias, weight_scale}, activation, {});
}

Tensor mlp_int8(Tensor x, bool norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor weight, Tensor packed,
                Tensor weight_scale, Maybe bias, std::string activation, Tensor weight2, Tensor packed2,
                Tensor weight_scale2, Maybe bias2, Maybe scale, Maybe residual) {
  return fused_linear("mlp_int8", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                      {weight, packed, bias, weight_scale}, activation, Weight{weight2, packed2, bias2, weight_scale2});
}

Tensor attention_int8(Tensor x, bool norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor qkv_weight,
                      Tensor qkv_packed, Tensor qkv_scale, Maybe qkv_bias, int64_t num_heads, bool is_causal,
                      Tensor proj_weight, Tensor proj_packed, Tensor proj_scale, Maybe proj_bias, Maybe scale,
                      Maybe residual) {
  return attention_branch("attention_int8", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                          {qkv_weight, qkv_packed, qkv_bias, qkv_scale}, num_heads, is_causal,
                          {proj_weight, proj_packed, proj_bias, proj_scale});
}

Tensor window_attention_int8(Tensor x, bool norm, Maybe norm_weight, Maybe norm_bias, double eps, Tensor qkv_weight,
                             Tensor qkv_packed, Tensor qkv_scale, Maybe qkv_bias, Ints window_size, Ints shift_size,
                             int64_t num_heads, Maybe bias_table, bool mask_padding, Tensor proj_weight,
                             Tensor proj_packed, Tensor proj_scale, Maybe proj_bias, Maybe scale, Maybe residual) {
  return window_attention_branch("window_attention_int8", x, {norm, norm_weight, norm_bias, eps, scale, residual},
                                 {qkv_weight, qkv_packed, qkv_bias, qkv_scale}, window_size, shift_size, num_heads,
                                 bias_table, mask_padding, {proj_weight, proj_packed, proj_bias, proj_scale});
}

}  // namespace
}  // namespace pyvit

#if defined(_WIN32)
#define PYVIT_EXPORT extern "C" __declspec(dllexport)
#else
#define PYVIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif
PYVIT_EXPORT void pyvit_when_changed_late(void (*callback)()) { pyvit::changed_late = callback; }

STABLE_TORCH_LIBRARY_FRAGMENT(PYVIT_NAMESPACE, m) {
  m.def("prepack_weight(Tensor weight, int parts=1) -> Tensor");
  m.def("prepack_header(Tensor weight) -> Tensor");
  m.def("is_prepacked(Tensor weight, Tensor(a!) header) -> bool");
  m.def(
      "prepacked_mlp(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
      "Tensor packed, Tensor? bias, str activation, Tensor? weight2, Tensor? packed2, Tensor? bias2, Tensor? scale, "
      "Tensor? residual) -> Tensor");
  m.def(
      "prepacked_gated_mlp(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
      "Tensor packed, Tensor? bias, Tensor? gate_weight, Tensor? gate_packed, Tensor? gate_bias, bool gate_last, "
      "str activation, int hidden_norm, Tensor? hidden_norm_weight, Tensor? hidden_norm_bias, float hidden_eps, "
      "Tensor weight2, Tensor packed2, Tensor? bias2, Tensor? scale, Tensor? residual) -> Tensor");
  m.def(
      "prepacked_attention(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight, "
      "Tensor qkv_packed, Tensor? qkv_bias, int num_heads, bool is_causal, Tensor proj_weight, Tensor proj_packed, "
      "Tensor? proj_bias, Tensor? scale, Tensor? residual) -> Tensor");
  m.def(
      "prepacked_window_attention(Tensor x, int norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor qkv_weight, Tensor qkv_packed, Tensor? qkv_bias, int[] window_size, int[] shift_size, int num_heads, "
      "Tensor? bias_table, bool mask_padding, Tensor proj_weight, Tensor proj_packed, Tensor? proj_bias, "
      "Tensor? scale, Tensor? residual) -> Tensor");
  m.def("int8_pack(Tensor weight) -> Tensor");
  m.def(
      "linear_int8(Tensor x, bool norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
      "Tensor packed, Tensor weight_scale, Tensor? bias, str activation, Tensor? scale, Tensor? residual) -> Tensor");
  m.def(
      "mlp_int8(Tensor x, bool norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, "
      "Tensor packed, Tensor weight_scale, Tensor? bias, str activation, Tensor weight2, Tensor packed2, "
      "Tensor weight_scale2, Tensor? bias2, Tensor? scale, Tensor? residual) -> Tensor");
  m.def(
      "attention_int8(Tensor x, bool norm, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv_weight, "
      "Tensor qkv_packed, Tensor qkv_scale, Tensor? qkv_bias, int num_heads, bool is_causal, Tensor proj_weight, "
      "Tensor proj_packed, Tensor proj_scale, Tensor? proj_bias, Tensor? scale, Tensor? residual) -> Tensor");
  m.def(
      "window_attention_int8(Tensor x, bool norm, Tensor? norm_weight, Tensor? norm_bias, float eps, "
      "Tensor qkv_weight, Tensor qkv_packed, Tensor qkv_scale, Tensor? qkv_bias, int[] window_size, int[] shift_size, "
      "int num_heads, Tensor? bias_table, bool mask_padding, Tensor proj_weight, Tensor proj_packed, "
      "Tensor proj_scale, Tensor? proj_bias, Tensor? scale, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(PYVIT_NAMESPACE, CPU, m) {
  m.impl("prepack_weight", TORCH_BOX(&pyvit::prepack_weight));
  m.impl("prepack_header", TORCH_BOX(&pyvit::prepack_header));
  m.impl("is_prepacked", TORCH_BOX(&pyvit::is_prepacked));
  m.impl("prepacked_mlp", TORCH_BOX(&pyvit::prepacked_mlp));
  m.impl("prepacked_gated_mlp", TORCH_BOX(&pyvit::prepacked_gated_mlp));
  m.impl("prepacked_attention", TORCH_BOX(&pyvit::prepacked_attention));
  m.impl("prepacked_window_attention", TORCH_BOX(&pyvit::prepacked_window_attention));
  m.impl("int8_pack", TORCH_BOX(&pyvit::int8_pack));
  m.impl("linear_int8", TORCH_BOX(&pyvit::linear_int8));
  m.impl("mlp_int8", TORCH_BOX(&pyvit::mlp_int8));
  m.impl("attention_int8", TORCH_BOX(&pyvit::attention_int8));
  m.impl("window_attention_int8", TORCH_BOX(&pyvit::window_attention_int8));
}
