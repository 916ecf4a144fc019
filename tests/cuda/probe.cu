// Kernels that show the pieces one by one: single instructions, operand loads, and what the emulation must catch.
#include "kernel_launch.cuh"

namespace pyvit::cuda {
namespace {

struct Registers {
  int which;
  const uint32_t *a, *b;  // (32, 4), (32, 2)
  float* c;               // (32, 4)
};

__global__ void one_mma(const __grid_constant__ Registers p) {
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[lane * 4 + i], c[i] = p.c[lane * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = p.b[lane * 2 + i];
  if (p.which == 0) mma(bf16{}, c, a, b);
  if (p.which == 1) mma(f16{}, c, a, b);
  if (p.which == 2) mma_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) p.c[lane * 4 + i] = c[i];
}

struct Matrices {
  int transposed;
  const uint16_t* rows;  // (4, 8, 8)
  uint32_t* registers;   // (32, 4)
};

__global__ void one_ldmatrix(const __grid_constant__ Matrices p) {
  auto* shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = p.rows[lane * 8 + i];
  PYVIT_BARRIER();
  uint32_t r[4];
  if (p.transposed)
    ldmatrix_x4_transposed(r, shared_row(shared + lane * 8));
  else
    ldmatrix_x4(r, shared_row(shared + lane * 8));
  for (int i = 0; i < 4; ++i) p.registers[lane * 4 + i] = r[i];
}

template <class T>
struct Product {
  const T *a, *b;  // A (16, 32) or its transpose, B^T (16, 32) or B
  float* c;        // (16, 16)
  int a_by_k, b_by_k;
};

template <class T>
__global__ void one_product(const __grid_constant__ Product<T> p) {
  const int lane = threadIdx.x;
  T* shared = reinterpret_cast<T*>(shared_memory());
  const Tile<T, 32> a{shared}, b{shared + 512};
  const Tile<T, 16> a_by_k{shared}, b_by_k{shared + 512};
  for (int i = lane; i < 512; i += 32) {
    *(p.a_by_k ? a_by_k.at(i / 16, i % 16) : a.at(i / 32, i % 32)) = p.a[i];
    *(p.b_by_k ? b_by_k.at(i / 16, i % 16) : b.at(i / 32, i % 32)) = p.b[i];
  }
  PYVIT_BARRIER();
  float c[2][4] = {};
  for (int k = 0; k < 32; k += Fragments<T>::kK) {
    Fragments<T> f;
    if (p.a_by_k)
      f.load_a_transposed(f.place_a_transposed(a_by_k, 0, lane), k);
    else
      f.load_a(a, 0, k, lane);
    if (p.b_by_k)
      f.load_b_transposed(f.place_b_transposed(b_by_k, 0, lane), k);
    else
      f.load_b(f.place_b(b, k, lane), 0);
    f.multiply(c[0], c[1]);
  }
  for (int n = 0; n < 2; ++n)
    for (int e = 0; e < 4; ++e) p.c[(lane / 4 + e / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + e % 2] = c[n][e];
}

struct Fault {
  int which;
  const float* in;  // (64)
  float* out;       // (64)
};

__global__ void fault(const __grid_constant__ Fault p) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, other = (thread + 33) % 64;
  switch (p.which) {
    case 0:  // an exchange, with the barrier it needs
    case 1:  // and without
      shared[thread] = p.in[thread];
      if (p.which == 0) PYVIT_BARRIER();
      p.out[thread] = shared[other];
      break;
    case 2:  // only some threads reach the barrier
      if (thread < 40) PYVIT_BARRIER();
      break;
    case 3:  // read before the copy has landed
    case 4:  // never waited for
      if (thread < 16) copy_async(shared + 4 * thread, p.in + 4 * thread, 16);
      copy_commit();
      p.out[thread] = thread < 16 ? shared[4 * thread] : 0.0f;
      if (p.which == 3) copy_wait<0>();
      break;
    case 5:  // a collective that some lanes do not join
      if (thread % 32 < 20) p.out[thread] = shuffle_xor(1.0f, 1);
      break;
    case 6:
      shared[64] = 1.0f;
      break;
    case 7:
      p.out[thread + 1] = p.in[thread];
      break;
    case 8:
      p.out[thread] = float(*reinterpret_cast<const int64_t*>(reinterpret_cast<const char*>(p.in) + 4));
      break;
    case 9:  // shared memory that nobody wrote
      p.out[thread] = shared[thread];
      break;
    case 10:  // a row of a matrix that does not begin on 16 bytes
    case 11:  // and one that is not in shared memory
      uint32_t r[4];
      ldmatrix_x4(
          r, shared_row(reinterpret_cast<const uint16_t*>(p.which == 10 ? shared : p.in) + (p.which == 10 ? 4 : 0)));
      p.out[thread] = float(r[0]);
      break;
  }
}

template <class Params>
const char* run(const char* name, void (*kernel)(Params), int threads, int shared, const Params& params) {
  return launch(name, kernel, 1, threads, shared, params, Stream{});
}

}  // namespace

extern "C" {
const char* probe_mma(int which, const uint32_t* a, const uint32_t* b, float* c) {
  return run("one_mma", one_mma, 32, 0, Registers{which, a, b, c});
}
const char* probe_ldmatrix(int transposed, const uint16_t* rows, uint32_t* registers) {
  return run("one_ldmatrix", one_ldmatrix, 32, 512, Matrices{transposed, rows, registers});
}
const char* probe_product_f32(const float* a, const float* b, float* c, int a_by_k, int b_by_k) {
  return run("one_product", one_product<float>, 32, 4096, Product<float>{a, b, c, a_by_k, b_by_k});
}
const char* probe_product_f16(const f16* a, const f16* b, float* c, int a_by_k, int b_by_k) {
  return run("one_product", one_product<f16>, 32, 2048, Product<f16>{a, b, c, a_by_k, b_by_k});
}
const char* probe_product_bf16(const bf16* a, const bf16* b, float* c, int a_by_k, int b_by_k) {
  return run("one_product", one_product<bf16>, 32, 2048, Product<bf16>{a, b, c, a_by_k, b_by_k});
}
const char* probe_fault(int which, const float* in, float* out, int shared) {
  return run("fault", fault, 64, shared, Fault{which, in, out});
}
const char* probe_round(int type, const float* in, float* out, int count) {
  for (int i = 0; i < count; ++i)
    out[i] = type == 0   ? widen(narrow<bf16>(in[i]))
             : type == 1 ? widen(narrow<f16>(in[i]))
                         : float_of(round_tf32(in[i]));
  return nullptr;
}
}

}  // namespace pyvit::cuda
