// Forward and backward of the gated activation, fused, for float32 and bfloat16 on CPU.
//
// Plain C++ and OpenMP with a C interface: no header of torch and none of Python, so that a build takes a second and
// depends on neither's ABI. `cpp.py` compiles and calls it; the formulas are those of `eager.py`.
//
// A row is one (token, expert) pair: h holds 2F values (swiglu: gate, then up) or F (gelu), the result F. Arithmetic is
// float32; bfloat16 is rounded once, when a result is stored.

#include "arithmetic.inc.cpp"

namespace {

// Values `from` to `to` of a row, LANES at a time. Without the number the compiler takes as many as fill a register of the
// smallest type, and the rest of the row one by one: a narrow expert would be all rest.
template <int LANES, typename T>
void forward_part(const T* __restrict h, float gate, T* __restrict out, int64_t width, int64_t from, int64_t to, bool swiglu) {
  if (from == to) return;
  if (swiglu) {
#pragma omp simd simdlen(LANES)
    for (int64_t f = from; f < to; ++f) {
      const float g = load(h[f]);
      store(out[f], g * sigmoid(g) * load(h[width + f]) * gate);
    }
  } else {
#pragma omp simd simdlen(LANES)
    for (int64_t f = from; f < to; ++f) {
      const float x = load(h[f]);
      float bell;
      store(out[f], x * normal_cdf(x, bell) * gate);
    }
  }
}

template <typename T>
void forward_row(const T* __restrict h, float gate, T* __restrict out, int64_t width, bool swiglu) {
  const int64_t wide = width & ~31, half = width & ~15, quarter = width & ~7;
  forward_part<32>(h, gate, out, width, 0, wide, swiglu);
  forward_part<16>(h, gate, out, width, wide, half, swiglu);
  forward_part<8>(h, gate, out, width, half, quarter, swiglu);
  forward_part<1>(h, gate, out, width, quarter, width, swiglu);
}

// Returns the part's share of the gradient of the gate.
template <int LANES, typename T>
float backward_part(T* __restrict grad, const T* __restrict h, float gate, T* __restrict grad_h, int64_t width,
                    int64_t from, int64_t to, bool swiglu) {
  float grad_gate = 0.0f;
  if (from == to) return grad_gate;
  if (swiglu) {
#pragma omp simd simdlen(LANES) reduction(+ : grad_gate)
    for (int64_t f = from; f < to; ++f) {
      const float g = load(h[f]), up = load(h[width + f]), d = load(grad[f]);
      const float s = sigmoid(g);
      const float silu = g * s, act = silu * up;
      grad_gate += d * act;
      // d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
      store(grad_h[f], d * gate * up * (s + silu * (1.0f - s)));
      store(grad_h[width + f], d * gate * silu);
      store(grad[f], act * gate);
    }
  } else {
#pragma omp simd simdlen(LANES) reduction(+ : grad_gate)
    for (int64_t f = from; f < to; ++f) {
      const float x = load(h[f]), d = load(grad[f]);
      float bell;
      const float cdf = normal_cdf(x, bell);
      const float act = x * cdf;
      grad_gate += d * act;
      // d gelu(x) / dx = Phi(x) + x * phi(x)
      store(grad_h[f], d * gate * (cdf + x * bell * 0.398942280f));
      store(grad[f], act * gate);
    }
  }
  return grad_gate;
}

// Returns the gradient of the gate. `grad` is read, then overwritten with the result of the forward pass.
template <typename T>
float backward_row(T* __restrict grad, const T* __restrict h, float gate, T* __restrict grad_h, int64_t width,
                   bool swiglu) {
  const int64_t wide = width & ~31, half = width & ~15, quarter = width & ~7;
  return backward_part<32>(grad, h, gate, grad_h, width, 0, wide, swiglu) +
         backward_part<16>(grad, h, gate, grad_h, width, wide, half, swiglu) +
         backward_part<8>(grad, h, gate, grad_h, width, half, quarter, swiglu) +
         backward_part<1>(grad, h, gate, grad_h, width, quarter, width, swiglu);
}

template <typename T>
void forward(const T* h, const T* gates, T* out, int64_t rows, int64_t width, int swiglu, int threads) {
  const int64_t in_width = swiglu ? 2 * width : width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const float gate = gates ? load(gates[row]) : 1.0f;
    forward_row(h + row * in_width, gate, out + row * width, width, swiglu != 0);
  }
}

template <typename T>
void backward(T* grad, const T* h, const T* gates, T* grad_h, T* grad_gates, int64_t rows, int64_t width, int swiglu,
              int threads) {
  const int64_t in_width = swiglu ? 2 * width : width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const float gate = gates ? load(gates[row]) : 1.0f;
    const float grad_gate =
        backward_row(grad + row * width, h + row * in_width, gate, grad_h + row * in_width, width, swiglu != 0);
    if (gates) store(grad_gates[row], grad_gate);
  }
}

}  // namespace

extern "C" {

void dsmoe_forward_float32(const void* h, const void* gates, void* out, int64_t rows, int64_t width, int swiglu,
                           int threads) {
  forward(static_cast<const float*>(h), static_cast<const float*>(gates), static_cast<float*>(out), rows, width, swiglu,
          threads);
}

void dsmoe_forward_bfloat16(const void* h, const void* gates, void* out, int64_t rows, int64_t width, int swiglu,
                            int threads) {
  forward(static_cast<const bfloat16*>(h), static_cast<const bfloat16*>(gates), static_cast<bfloat16*>(out), rows,
          width, swiglu, threads);
}

void dsmoe_backward_float32(void* grad, const void* h, const void* gates, void* grad_h, void* grad_gates, int64_t rows,
                            int64_t width, int swiglu, int threads) {
  backward(static_cast<float*>(grad), static_cast<const float*>(h), static_cast<const float*>(gates),
           static_cast<float*>(grad_h), static_cast<float*>(grad_gates), rows, width, swiglu, threads);
}

void dsmoe_backward_bfloat16(void* grad, const void* h, const void* gates, void* grad_h, void* grad_gates,
                             int64_t rows, int64_t width, int swiglu, int threads) {
  backward(static_cast<bfloat16*>(grad), static_cast<const bfloat16*>(h), static_cast<const bfloat16*>(gates),
           static_cast<bfloat16*>(grad_h), static_cast<bfloat16*>(grad_gates), rows, width, swiglu, threads);
}

}  // extern "C"
