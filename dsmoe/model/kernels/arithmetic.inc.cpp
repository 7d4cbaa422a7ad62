// What the kernels share: bfloat16, exp, sigmoid and the normal distribution function, in float32, for the compiler to
// vectorise. Included by the other sources, not compiled by itself.

#pragma once

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
inline float load(int8_t x) { return x; }
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

}  // namespace
