// Forward and backward of the gated activation, fused, for float32 and bfloat16 on CPU.
//
// Plain C++ and OpenMP with a C interface: no header of torch and none of Python, so that a build takes a second and
// depends on neither's ABI. `cpp.py` compiles and calls it; the formulas are those of `eager.py`.
//
// A row is one (token, expert) pair: h holds 2F values (swiglu: gate, then up) or F (gelu), the result F. Arithmetic is
// float32; bfloat16 is rounded once, when a result is stored.

#include <cstdint>
#include <cstring>

namespace {

struct bfloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline void store(float& to, float x) { to = x; }
inline void store(bfloat16& to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest_even);
}

// exp(x) = 2^n exp(r) with |r| <= log(2) / 2, where the Taylor polynomial of degree 7 is off by 6e-9 at most.
// Beyond what a normal float32 can hold the result is 0 or infinity; NaN passes through both comparisons.
inline float exp_(float x) {
  x = x < -88.0f ? -88.0f : x;  // n = -127: exponent bits of 0
  x = x > 89.0f ? 89.0f : x;    // n = 128: exponent bits of infinity
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(magic) + 127u;
  return p * bit_cast<float>(exponent << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

// The normal distribution function at x, and exp(-x^2 / 2) on the way.
// The upper tail is exp(-a^2 / 2) * t * P(t) with a = |x|, t = 1 / (1 + a / 4); P is fitted on a >= 0 to a relative
// error of 3.4e-8 (weighted least squares at 4000 Chebyshev points in t).
inline float normal_cdf(float x, float& bell) {
  const float a = x < 0.0f ? -x : x;
  const float t = 1.0f / (1.0f + 0.25f * a);
  bell = exp_(-0.5f * x * x);
  float p = 1.978203214e-02f;
  p = p * t - 8.087740674e-02f;
  p = p * t + 9.559724255e-02f;
  p = p * t - 3.171765544e-02f;
  p = p * t + 6.369917047e-02f;
  p = p * t + 5.897513634e-02f;
  p = p * t + 8.160311005e-02f;
  p = p * t + 9.346635531e-02f;
  p = p * t + 9.973643161e-02f;
  p = p * t + 9.973556672e-02f;
  const float tail = bell * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

template <typename T>
void forward_row(const T* __restrict h, float gate, T* __restrict out, int64_t width, bool swiglu) {
  if (swiglu) {
#pragma omp simd
    for (int64_t f = 0; f < width; ++f) {
      const float g = load(h[f]);
      store(out[f], g * sigmoid(g) * load(h[width + f]) * gate);
    }
  } else {
#pragma omp simd
    for (int64_t f = 0; f < width; ++f) {
      const float x = load(h[f]);
      float bell;
      store(out[f], x * normal_cdf(x, bell) * gate);
    }
  }
}

// Returns the gradient of the gate. `grad` is read, then overwritten with the result of the forward pass.
template <typename T>
float backward_row(T* __restrict grad, const T* __restrict h, float gate, T* __restrict grad_h, int64_t width,
                   bool swiglu) {
  float grad_gate = 0.0f;
  if (swiglu) {
#pragma omp simd reduction(+ : grad_gate)
    for (int64_t f = 0; f < width; ++f) {
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
#pragma omp simd reduction(+ : grad_gate)
    for (int64_t f = 0; f < width; ++f) {
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
