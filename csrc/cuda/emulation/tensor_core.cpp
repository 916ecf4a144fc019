// Warp instructions on 32 lanes' registers at once, with the operand layouts of the PTX manual.
#include <cmath>

#include "emulation.h"

// The arithmetic below touches only arrays of fixed size on its own stack and registers that lanes brought: without the
// sanitizers' checks on each element it is ten times faster, and the checks of interest are those in the kernels.
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))

namespace pyvit::emulation {

float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

UNCHECKED float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) {
    const float small = float(mantissa) * 0x1p-24f;
    return sign ? -small : small;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (std::isnan(value)) return sign | 0x7E00;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  bits &= 0x7FFFFFFF;
  return sign | uint16_t((bits + 0xFFF + (bits >> 13 & 1) - 0x38000000u) >> 13);
}

void combine_shuffle_xor(void* const operands[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<ShuffleOperand*>(operands[lane]);
    mine->result = static_cast<ShuffleOperand*>(operands[lane ^ mine->lane_mask])->value;
  }
}

// Thread t of the warp receives, of each 8 x 8 matrix of 16-bit elements, row t / 4 and columns 2 (t % 4) and the next
// (transposed: column t / 4 and those rows).
void combine_ldmatrix_x4(void* const operands[32]) {
  for (int lane = 0; lane < 32; ++lane) check_shared_row(static_cast<LdmatrixOperand*>(operands[lane])->row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t m[8][8];
    for (int r = 0; r < 8; ++r) memcpy(m[r], static_cast<LdmatrixOperand*>(operands[8 * matrix + r])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      auto* o = static_cast<LdmatrixOperand*>(operands[lane]);
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = o->transpose ? m[c][r] : m[r][c], high = o->transpose ? m[c + 1][r] : m[r][c + 1];
      o->registers[matrix] = low | high << 16;
    }
  }
}

namespace {

template <int K>
UNCHECKED void multiply(void* const operands[32], const float (&a)[16][K], const float (&b)[K][8]) {
  float c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const float* mine = static_cast<MmaOperand*>(operands[lane])->c;
    const int g = lane / 4, t = lane % 4 * 2;
    c[g][t] = mine[0], c[g][t + 1] = mine[1], c[g + 8][t] = mine[2], c[g + 8][t + 1] = mine[3];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    float* mine = static_cast<MmaOperand*>(operands[lane])->c;
    const int g = lane / 4, t = lane % 4 * 2;
    mine[0] = c[g][t], mine[1] = c[g][t + 1], mine[2] = c[g + 8][t], mine[3] = c[g + 8][t + 1];
  }
}

template <float (*Widen)(uint16_t)>
UNCHECKED void multiply_16bit(void* const operands[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* o = static_cast<MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      a[g][t + half] = Widen(uint16_t(o->a[0] >> shift));
      a[g + 8][t + half] = Widen(uint16_t(o->a[1] >> shift));
      a[g][t + 8 + half] = Widen(uint16_t(o->a[2] >> shift));
      a[g + 8][t + 8 + half] = Widen(uint16_t(o->a[3] >> shift));
      b[t + half][g] = Widen(uint16_t(o->b[0] >> shift));
      b[t + 8 + half][g] = Widen(uint16_t(o->b[1] >> shift));
    }
  }
  multiply<16>(operands, a, b);
}

// The tensor core reads the upper 19 bits of a register; what was not rounded beforehand is cut off.
float tf32(uint32_t bits) {
  bits &= 0xFFFFE000u;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void combine_mma_bf16(void* const operands[32]) { multiply_16bit<bfloat16_to_float>(operands); }
void combine_mma_f16(void* const operands[32]) { multiply_16bit<half_to_float>(operands); }

void combine_mma_tf32(void* const operands[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* o = static_cast<MmaOperand*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    a[g][t] = tf32(o->a[0]), a[g + 8][t] = tf32(o->a[1]), a[g][t + 4] = tf32(o->a[2]), a[g + 8][t + 4] = tf32(o->a[3]);
    b[t][g] = tf32(o->b[0]), b[t + 4][g] = tf32(o->b[1]);
  }
  multiply<8>(operands, a, b);
}

}  // namespace pyvit::emulation
