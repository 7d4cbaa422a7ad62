// Vectors, weight types and memory that the inference kernels share. Included by the other sources, not compiled by itself.

#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "arithmetic.inc.cpp"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define DSMOE_DOT 1
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));

inline vec load_vec(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_vec(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline vec widen(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  vec v;
  for (int i = 0; i < LANES; ++i) v[i] = load(p[i]);
  return v;
#endif
}
inline vec widen(const float* p) { return load_vec(p); }
inline vec widen(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  vec v;
  for (int i = 0; i < LANES; ++i) v[i] = load(p[i]);
  return v;
#endif
}

inline vec broadcast(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);  // bits, not values: x may hold two bfloat16
#else
  vec v;
  for (int i = 0; i < LANES; ++i) v[i] = x;
  return v;
#endif
}

inline float sum(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
#endif
}

#if defined(__AVX512F__)
// Lane i of the result sums half of block i of `a`, the other lanes of `b`: one level of `sums_of`, for blocks of 2 * G lanes.
template <int G>
inline vec add_halves(vec a, vec b) {
  alignas(64) static constexpr auto low = [] {
    std::array<int32_t, LANES> index{};
    for (int lane = 0; lane < LANES; ++lane)
      index[lane] = lane / (2 * G) * (2 * G) + lane % G + (lane % (2 * G) < G ? 0 : LANES);
    return index;
  }();
  const __m512i first = _mm512_load_si512(low.data());
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(G));
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  return reinterpret_cast<vec>(_mm512_permutex2var_ps(x, first, y)) +
         reinterpret_cast<vec>(_mm512_permutex2var_ps(x, second, y));
}
#endif

// Lane i: the sum of vector i of LANES many.
inline vec sums_of(const vec* v) {
#if defined(__AVX512F__)
  vec w[8];
  for (int i = 0; i < 8; ++i) w[i] = add_halves<8>(v[i], v[i + 8]);
  for (int i = 0; i < 4; ++i) w[i] = add_halves<4>(w[i], w[i + 4]);
  for (int i = 0; i < 2; ++i) w[i] = add_halves<2>(w[i], w[i + 2]);
  return add_halves<1>(w[0], w[1]);
#else
  vec sums;
  for (int i = 0; i < LANES; ++i) sums[i] = sum(v[i]);
  return sums;
#endif
}

// How a weight type is multiplied. `Input` is the type that x is held in; a product takes `PAIR` numbers of each 32-bit
// lane; `CHUNK` numbers make a vector. Weights that are `SCALED` come with one factor for each row.
struct Float {
  static constexpr bool SCALED = false;
  typedef float Weight;
  typedef float Input;
  static constexpr int PAIR = 1, CHUNK = LANES;
  static vec madd(vec sum, vec a, vec b) { return sum + a * b; }
  static vec load_input(const Input* p) { return load_vec(p); }
  static vec load_weight(const Weight* p) { return load_vec(p); }
};

#if defined(DSMOE_DOT)
struct Bfloat16 {
  static constexpr bool SCALED = false;
  typedef bfloat16 Weight;
  typedef bfloat16 Input;
  static constexpr int PAIR = 2, CHUNK = 2 * LANES;
  static vec madd(vec sum, vec a, vec b) {
    return reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                  reinterpret_cast<__m512bh>(b)));
  }
  static vec load_input(const Input* p) { return load_vec(reinterpret_cast<const float*>(p)); }
  static vec load_weight(const Weight* p) { return load_vec(reinterpret_cast<const float*>(p)); }
};
#else
struct Bfloat16 {
  static constexpr bool SCALED = false;
  typedef bfloat16 Weight;
  typedef float Input;
  static constexpr int PAIR = 1, CHUNK = LANES;
  static vec madd(vec sum, vec a, vec b) { return sum + a * b; }
  static vec load_input(const Input* p) { return load_vec(p); }
  static vec load_weight(const Weight* p) { return widen(p); }
};
#endif

struct Int8 {
  static constexpr bool SCALED = true;
  typedef int8_t Weight;
  typedef float Input;
  static constexpr int PAIR = 1, CHUNK = LANES;
  static vec madd(vec sum, vec a, vec b) { return sum + a * b; }
  static vec load_input(const Input* p) { return load_vec(p); }
  static vec load_weight(const Weight* p) { return widen(p); }
};

// Memory that a thread keeps from call to call: fresh memory costs page faults.
template <typename T>
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  T* get(int64_t count) {
    if (count > count_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
      data_ = static_cast<T*>(std::aligned_alloc(4096, bytes));
      if (data_ == nullptr) std::abort();
      count_ = count;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace
