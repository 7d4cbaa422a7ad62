// One decoding step of the whole model on CPU: token ids in, logits out, keys and values appended to a preallocated cache.
// Plain C++ and OpenMP with a C interface; decoder.py mirrors the structs. The dense twin runs through the same code, as
// one expert without a router.
//
// All threads run the same program and split the rows of matrices, the KV heads and the hidden units of experts. What is
// small (norms, routers) every thread computes for itself, which is cheaper than waiting. The residual stream and all sums
// are float32. Tokens of a bfloat16 model are rounded to bfloat16 where they meet a matrix, also before a router.

#include <chrono>
#include <cmath>

#include <omp.h>

#define DSMOE_FEW_TOKENS_ONLY  // keeps the compilation short
#include "experts.inc.cpp"

namespace {

// [rows, depth], row by row. With scales: int8, and each row is multiplied with its factor.
struct Matrix {
  const void* data;
  const float* scales;
};

enum Choice : int64_t { DENSE, TOP_K, THRESHOLD, TOP_P, THRESHOLD_TOP_K };
enum Normalization : int64_t { SOFTMAX, L2, RENORMALIZED };

// `stored` of `experts` have weights: those of `index` (null: all). No experts: no router.
struct Routing {
  int64_t experts, stored;
  const int64_t* index;
  const void* weight;   // [experts, D], or of an MLP router [experts, hidden]
  const void* in_proj;  // [hidden, D], null in a linear router
  int64_t hidden;
  int64_t choice, k;  // threshold_top_k with k 0: as many as the batch keeps in the mean
  const float* thresholds;     // [stored]
  const float* score_weights;  // [experts] or null
  int64_t normalization;
  float top_p, scale, constant;
};

struct Layer {
  const void *attention_norm, *mlp_norm, *q_norm, *k_norm;
  Matrix q, k, v, o, up, down;
  Routing attention, mlp;
  void *keys, *values;  // [batch, KV heads, slots, head_dim]
};

struct Model {
  const Layer* layers;
  const void *embedding, *norm;
  Matrix lm_head;
  const float *cosines, *sines;  // [slots, head_dim / 2]
  int64_t num_layers, hidden, vocab, width, swiglu;
  int64_t heads, kv_heads, head_dim, slots, qk_norm;  // 0 none, 1 full, 2 per head
  int64_t normalize_embeddings;
  float eps;
};

enum Part { ATTENTION_PROJECTIONS, ATTENTION, MLP, LM_HEAD, PARTS };

// Weights of `Type` and inputs in float32, where a product must not round its input.
struct WideBfloat16 {
  typedef bfloat16 Weight;
  typedef float Input;
  static constexpr bool SCALED = false;
  static constexpr int PAIR = 1, CHUNK = LANES;
  static vec madd(vec sum, vec a, vec b) { return sum + a * b; }
  static vec load_input(const Input* p) { return load_vec(p); }
  static vec load_weight(const Weight* p) { return widen(p); }
};
template <typename Type> struct WideOf { typedef Float type; };
template <> struct WideOf<bfloat16> { typedef WideBfloat16 type; };
template <typename Type> using Wide = typename WideOf<Type>::type;

inline float dot(const float* a, const float* b, int64_t count) {
  vec sums = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sums += load_vec(a + i) * load_vec(b + i);
  float total = sum(sums);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// ---- matrices times few tokens ----

// Where products go: to out[token * stride + row], with `tokens` under other numbers.
struct Target {
  float* out;
  int64_t stride;
  bool add;
  const int64_t* tokens;
  void operator()(int64_t token, int64_t row, float value) const {
    float& to = out[(tokens == nullptr ? token : tokens[token]) * stride + row];
    to = add ? to + value : value;
  }
};

template <typename Op, int R, int T>
void some_rows(const typename Op::Weight* weight, const float* scales, int64_t depth, int64_t row,
                      const typename Op::Input* const* x, int64_t token, const Target& target) {
  const typename Op::Weight* first = weight + row * depth;
  const typename Op::Weight* ahead = first + R * depth;
  vec sums[R][T] = {};
  int64_t d = 0;
  for (; d + Op::CHUNK <= depth; d += Op::CHUNK) {
    vec w[R];
    for (int r = 0; r < R; ++r) {
      w[r] = Op::load_weight(first + r * depth + d);
      __builtin_prefetch(ahead + r * depth + d, 0, 2);
    }
    for (int t = 0; t < T; ++t) {
      const vec v = Op::load_input(x[t] + d);
      for (int r = 0; r < R; ++r) sums[r][t] = Op::madd(sums[r][t], w[r], v);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float total = sum(sums[r][t]);
      for (int64_t i = d; i < depth; ++i) total += load(first[r * depth + i]) * load(x[t][i]);
      target(token + t, row + r, total * scale_of<Op>(scales, row + r));
    }
}

template <typename Op, int T>
void rows_of(const typename Op::Weight* weight, const float* scales, int64_t depth, int64_t first, int64_t last,
                    const typename Op::Input* const* x, int64_t token, const Target& target) {
  constexpr int R = 4;
  int64_t row = first;
  for (; row + R <= last; row += R) some_rows<Op, R, T>(weight, scales, depth, row, x, token, target);
  for (; row < last; ++row) some_rows<Op, 1, T>(weight, scales, depth, row, x, token, target);
}

// Products of rows [first, last) and all tokens.
template <typename Op>
void product(const typename Op::Weight* weight, const float* scales, int64_t depth, int64_t first, int64_t last,
             const typename Op::Input* const* x, int64_t tokens, const Target& target) {
  // rows that stay in the cache between the groups of tokens
  const int64_t block = tokens <= 4 ? last - first : 16;
  for (int64_t from = first; from < last; from += block) {
    const int64_t to = std::min(last, from + block);
    for (int64_t t = 0; t < tokens; t += 4) {
      switch (std::min<int64_t>(4, tokens - t)) {
        case 1: rows_of<Op, 1>(weight, scales, depth, from, to, x + t, t, target); break;
        case 2: rows_of<Op, 2>(weight, scales, depth, from, to, x + t, t, target); break;
        case 3: rows_of<Op, 3>(weight, scales, depth, from, to, x + t, t, target); break;
        default: rows_of<Op, 4>(weight, scales, depth, from, to, x + t, t, target); break;
      }
    }
  }
}

// ---- tokens as inputs of matrices ----

inline void round_to(float*, bfloat16*, int64_t, const float*) {}
inline void round_to(float* wide, bfloat16* narrow, int64_t count, const bfloat16*) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    store(narrow[i], wide[i]);
    wide[i] = load(narrow[i]);
  }
}

inline const float* rows_as(const float* wide, const bfloat16*, const float*) { return wide; }
inline const bfloat16* rows_as(const float*, const bfloat16* narrow, const bfloat16*) { return narrow; }

// The tokens [tokens, size] of one thread, rounded as the weights' type asks, in each form that products take.
template <typename Op>
struct Inputs {
  Scratch<float> wide_memory;
  Scratch<bfloat16> narrow_memory;
  Scratch<const float*> wide_rows;
  Scratch<const bfloat16*> narrow_rows;
  float* wide = nullptr;
  int64_t tokens = 0, size = 0;

  float* get(int64_t tokens_, int64_t size_) {
    tokens = tokens_, size = size_;
    return wide = wide_memory.get(tokens * size);
  }
  void ready() {
    const bool narrow = sizeof(typename Op::Weight) == 2;
    bfloat16* rounded = narrow ? narrow_memory.get(tokens * size) : nullptr;
    round_to(wide, rounded, tokens * size, static_cast<const typename Op::Weight*>(nullptr));
    const float** rows = wide_rows.get(tokens);
    for (int64_t t = 0; t < tokens; ++t) rows[t] = wide + t * size;
    if (!narrow) return;
    const bfloat16** other = narrow_rows.get(tokens);
    for (int64_t t = 0; t < tokens; ++t) other[t] = rounded + t * size;
  }
  const float* const* rows(const float*) { return wide_rows.get(tokens); }
  const bfloat16* const* rows(const bfloat16*) { return narrow_rows.get(tokens); }
  const float* flat(const float*) { return wide; }
  const bfloat16* flat(const bfloat16*) { return narrow_memory.get(tokens * size); }
};

template <typename Op>
void times(const Matrix& matrix, Inputs<Op>& x, int64_t first, int64_t last, const Target& target) {
  typedef typename Op::Input Input;
  if (matrix.scales != nullptr) {
    product<Int8>(static_cast<const int8_t*>(matrix.data), matrix.scales, x.size, first, last,
                  x.rows(static_cast<const float*>(nullptr)), x.tokens, target);
  } else {
    product<Op>(static_cast<const typename Op::Weight*>(matrix.data), nullptr, x.size, first, last,
                x.rows(static_cast<const Input*>(nullptr)), x.tokens, target);
  }
}

// RMS normalisation of `count` numbers with weights (null: ones).
template <typename Type>
void normalise(const float* from, const Type* weight, float* to, int64_t count, float eps) {
  const float factor = 1.0f / std::sqrt(dot(from, from, count) / count + eps);
  if (weight == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor * load(weight[i]);
  }
}

// ---- routing ----

// Gates and kept experts [tokens, stored] of one thread; as `dsmoe.model.routing` says.
struct Kept_experts {
  Scratch<float> gate_memory, work;
  Scratch<uint8_t> mask_memory;
  Scratch<int64_t> order_memory;
  float* gates = nullptr;
  uint8_t* mask = nullptr;  // null: all
};

inline void keep_top(const float* scores, int64_t count, int64_t k, int64_t* order, uint8_t* mask) {
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::partial_sort(order, order + k, order + count, [scores](int64_t a, int64_t b) {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  });
  for (int64_t i = 0; i < k; ++i) mask[order[i]] = 1;
}

inline void keep_share(const float* shares, int64_t count, float top_p, int64_t* order, uint8_t* mask) {
  for (int64_t i = 0; i < count; ++i) order[i] = i;
  std::stable_sort(order, order + count, [shares](int64_t a, int64_t b) { return shares[a] > shares[b]; });
  float total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += shares[order[i]];
    if (i == 0 || total - shares[order[i]] < top_p) mask[order[i]] = 1;
  }
}

inline int64_t keep_above(const float* scores, const Routing& routing, uint8_t* mask) {
  int64_t kept = 0;
  for (int64_t i = 0; i < routing.stored; ++i) mask[i] = scores[i] * routing.experts > routing.thresholds[i];
  mask[std::max_element(scores, scores + routing.stored) - scores] = 1;
  for (int64_t i = 0; i < routing.stored; ++i) kept += mask[i];
  return kept;
}

// exp(p - the largest), in place; returns the sum.
inline float exponentials(float* p, int64_t count) {
  float highest = p[0], total = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t i = 0; i < count; ++i) highest = p[i] > highest ? p[i] : highest;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += p[i] = exp_(p[i] - highest);
  return total;
}

inline void to_probabilities(float* p, int64_t count) {
  const float total = exponentials(p, count);
  for (int64_t i = 0; i < count; ++i) p[i] /= total;
}

// Logits [tokens, experts] of a router, which takes its input as rounded for the matrices but multiplies in float32.
template <typename Type>
void router_logits(const Routing& routing, const float* const* x, int64_t tokens, int64_t size, float* hidden,
                   float* logits) {
  const Type* weight = static_cast<const Type*>(routing.weight);
  const int64_t experts = routing.experts, units = routing.hidden;
  if (routing.in_proj == nullptr)
    return product<Wide<Type>>(weight, nullptr, size, 0, experts, x, tokens, {logits, experts});
  product<Wide<Type>>(static_cast<const Type*>(routing.in_proj), nullptr, size, 0, units, x, tokens, {hidden, units});
  for (int64_t i = 0; i < tokens * units; ++i) hidden[i] *= sigmoid(hidden[i]);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = hidden + t * units;
    product<Wide<Type>>(weight, nullptr, units, 0, experts, &row, 1, {logits + t * experts, experts});
  }
}

template <typename Type>
void route(const Routing& routing, const float* const* x, int64_t tokens, int64_t size, Kept_experts& out) {
  const int64_t experts = routing.experts, stored = routing.stored;
  float* probs = out.work.get(tokens * experts + experts + stored + tokens * routing.hidden);
  float* scores = probs + tokens * experts;
  float* chosen = scores + experts;
  router_logits<Type>(routing, x, tokens, size, chosen + stored, probs);
  int64_t* order = out.order_memory.get(stored);
  out.gates = out.gate_memory.get(tokens * stored);
  out.mask = routing.choice == DENSE ? nullptr : out.mask_memory.get(tokens * stored);
  const auto column = [&](int64_t i) { return routing.index == nullptr ? i : routing.index[i]; };
  const auto score = [&](int64_t t) {
    std::copy(probs + t * experts, probs + (t + 1) * experts, scores);
    if (routing.score_weights != nullptr) {
      float total = 0;
      for (int64_t e = 0; e < experts; ++e) total += scores[e] *= routing.score_weights[e];
      if (routing.choice == TOP_P)
        for (int64_t e = 0; e < experts; ++e) scores[e] /= total;
    }
    for (int64_t i = 0; i < stored; ++i) chosen[i] = scores[column(i)];
  };
  for (int64_t t = 0; t < tokens; ++t) to_probabilities(probs + t * experts, experts);
  if (out.mask != nullptr) std::fill(out.mask, out.mask + tokens * stored, 0);
  int64_t k = routing.k;
  if (routing.choice == THRESHOLD_TOP_K && k == 0) {
    float total = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      score(t);
      total += keep_above(chosen, routing, out.mask + t * stored);
    }
    k = std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(total / tokens)));
    std::fill(out.mask, out.mask + tokens * stored, 0);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float* p = probs + t * experts;
    uint8_t* mask = out.mask == nullptr ? nullptr : out.mask + t * stored;
    if (mask != nullptr) score(t);
    if (routing.choice == TOP_K || routing.choice == THRESHOLD_TOP_K) keep_top(chosen, stored, k, order, mask);
    if (routing.choice == TOP_P) keep_share(chosen, stored, routing.top_p, order, mask);
    if (routing.choice == THRESHOLD) keep_above(chosen, routing, mask);
    float* gates = out.gates + t * stored;
    float total = 0;
    for (int64_t i = 0; i < stored; ++i) {
      gates[i] = mask == nullptr || mask[i] ? p[column(i)] : 0.0f;
      total += gates[i];
    }
    float factor = routing.scale;
    if (routing.normalization == L2) factor /= std::sqrt(dot(p, p, experts));
    if (routing.normalization == RENORMALIZED) factor /= total;
    for (int64_t i = 0; i < stored; ++i) gates[i] *= factor;
    if (routing.constant != 0)
      for (int64_t i = 0; i < stored; ++i)
        if (mask == nullptr || mask[i]) gates[i] = routing.constant + (1 - routing.constant) * gates[i];
  }
}

// ---- attention ----

// Normalises (weight null: not), rotates and scales one head.
template <typename Type>
void prepare_head(const Model& model, const float* from, const Type* weight, int64_t position, float factor, float eps,
                  float* to) {
  const int64_t size = model.head_dim, half = size / 2;
  const float* cosines = model.cosines + position * half;
  const float* sines = model.sines + position * half;
  if (weight != nullptr) {
    normalise(from, weight, to, size, eps);
  } else {
    std::copy(from, from + size, to);
  }
  for (int64_t i = 0; i < half; ++i) {
    const float a = to[i], b = to[i + half];
    to[i] = factor * (a * cosines[i] - b * sines[i]);
    to[i + half] = factor * (b * cosines[i] + a * sines[i]);
  }
}

// scores[g][s] = q[g] . keys[s] of G heads that share their keys, so that each key is read once.
template <typename Op, int G>
void scores_of(const typename Op::Input* q, const typename Op::Weight* keys, int64_t length, int64_t size, float* scores) {
  constexpr int K = 4;  // keys at a time
  const int64_t whole = size / Op::CHUNK * Op::CHUNK;
  vec parts[G][LANES] = {};
  for (int64_t block = 0; block < length; block += LANES) {
    const int64_t count = std::min<int64_t>(LANES, length - block);
    for (int64_t s = 0; s < count; s += K) {
      const typename Op::Weight* key[K];
      for (int j = 0; j < K; ++j) key[j] = keys + std::min(block + s + j, length - 1) * size;
      vec sums[K][G] = {};
      for (int64_t i = 0; i < whole; i += Op::CHUNK)
        for (int j = 0; j < K; ++j) {
          const vec k = Op::load_weight(key[j] + i);
          for (int g = 0; g < G; ++g) sums[j][g] = Op::madd(sums[j][g], k, Op::load_input(q + g * size + i));
        }
      for (int j = 0; j < K; ++j)
        for (int g = 0; g < G; ++g) parts[g][s + j] = sums[j][g];
    }
    for (int g = 0; g < G; ++g) {
      float totals[LANES];
      store_vec(totals, sums_of(parts[g]));
      for (int64_t s = 0; s < count; ++s) {
        for (int64_t i = whole; i < size; ++i) totals[s] += load(keys[(block + s) * size + i]) * load(q[g * size + i]);
        scores[g * length + block + s] = totals[s];
      }
    }
  }
}

// out[g] = factors[g] * sum over s of weights[g][s] values[s], for numbers [i, i + V * LANES) of a head.
template <typename Type, int G, int V>
void some_values(const float* weights, const Type* values, int64_t length, int64_t size, int64_t i, const float* factors,
                 float* const* out) {
  vec sums[G][V] = {};
  for (int64_t s = 0; s < length; ++s)
    for (int v = 0; v < V; ++v) {
      const vec value = widen(values + s * size + i + v * LANES);
      for (int g = 0; g < G; ++g) sums[g][v] += value * weights[g * length + s];
    }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) store_vec(out[g] + i + v * LANES, sums[g][v] * factors[g]);
}

// The numbers of a head that have a faster way; returns where the others begin.
template <int G>
int64_t first_values(const float*, const float*, int64_t, int64_t, const float*, float* const*) {
  return 0;
}

#if defined(DSMOE_DOT)
// 64 numbers of a head, two slots at a time.
template <int G>
void values_in_pairs(const bfloat16* weights, const bfloat16* values, int64_t length, int64_t size, int64_t i,
                     const float* factors, float* const* out) {
  constexpr int V = 2;
  vec sums[G][V][2] = {};
  for (int64_t s = 0; s < length; s += 2) {
    const bfloat16* value = values + s * size + i;
    for (int v = 0; v < V; ++v) {
      const __m512i a = _mm512_loadu_si512(value + v * 32);
      const __m512i b = s + 1 < length ? _mm512_loadu_si512(value + size + v * 32) : _mm512_setzero_si512();
      const vec low = reinterpret_cast<vec>(_mm512_unpacklo_epi16(a, b));
      const vec high = reinterpret_cast<vec>(_mm512_unpackhi_epi16(a, b));
      for (int g = 0; g < G; ++g) {
        float pair;
        std::memcpy(&pair, weights + g * (length + 1) + s, sizeof pair);
        const vec weight = broadcast(pair);
        sums[g][v][0] = Bfloat16::madd(sums[g][v][0], low, weight);
        sums[g][v][1] = Bfloat16::madd(sums[g][v][1], high, weight);
      }
    }
  }
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v)
      for (int half = 0; half < 2; ++half) {
        float lanes[LANES];  // four numbers of each eight
        store_vec(lanes, sums[g][v][half] * factors[g]);
        for (int lane = 0; lane < LANES; ++lane) out[g][i + v * 32 + lane / 4 * 8 + half * 4 + lane % 4] = lanes[lane];
      }
}

// Weights are rounded to bfloat16, as torch does before this product.
template <int G>
int64_t first_values(const float* weights, const bfloat16* values, int64_t length, int64_t size, const float* factors,
                     float* const* out) {
  static thread_local Scratch<bfloat16> memory;
  bfloat16* rounded = memory.get(G * (length + 1));
  for (int g = 0; g < G; ++g) {
    bfloat16* row = rounded + g * (length + 1);
#pragma omp simd
    for (int64_t s = 0; s < length; ++s) store(row[s], weights[g * length + s]);
    row[length] = bfloat16{0};
  }
  int64_t i = 0;
  for (; i + 64 <= size; i += 64) values_in_pairs<G>(rounded, values, length, size, i, factors, out);
  return i;
}
#else
template <int G>
int64_t first_values(const float*, const bfloat16*, int64_t, int64_t, const float*, float* const*) {
  return 0;
}
#endif

// out[g] = softmax(q[g] keys^T) values, for G heads. `scores` is memory for [G, length].
template <typename Op, int G>
void attend_together(const typename Op::Input* q, const typename Op::Weight* keys, const typename Op::Weight* values,
                     int64_t length, int64_t size, float* scores, float* const* out) {
  scores_of<Op, G>(q, keys, length, size, scores);
  float factors[G];
  for (int g = 0; g < G; ++g) factors[g] = 1.0f / exponentials(scores + g * length, length);
  typedef typename Op::Weight Type;
  int64_t i = first_values<G>(scores, values, length, size, factors, out);
  for (; i + 4 * LANES <= size; i += 4 * LANES) some_values<Type, G, 4>(scores, values, length, size, i, factors, out);
  for (; i + LANES <= size; i += LANES) some_values<Type, G, 1>(scores, values, length, size, i, factors, out);
  for (; i < size; ++i)
    for (int g = 0; g < G; ++g) {
      float total = 0;
      for (int64_t s = 0; s < length; ++s) total += load(values[s * size + i]) * scores[g * length + s];
      out[g][i] = total * factors[g];
    }
}

// The heads of one KV head over slots [first, last).
template <typename Op>
void attend(const typename Op::Input* q, int64_t heads, const typename Op::Weight* keys,
            const typename Op::Weight* values, int64_t first, int64_t last, int64_t size, float* scores,
            float* const* out) {
  const int64_t length = last - first;
  keys += first * size, values += first * size;
  for (int64_t g = 0; g < heads; g += 4) {
    const typename Op::Input* some = q + g * size;
    switch (std::min<int64_t>(4, heads - g)) {
      case 1: attend_together<Op, 1>(some, keys, values, length, size, scores, out + g); break;
      case 2: attend_together<Op, 2>(some, keys, values, length, size, scores, out + g); break;
      case 3: attend_together<Op, 3>(some, keys, values, length, size, scores, out + g); break;
      default: attend_together<Op, 4>(some, keys, values, length, size, scores, out + g); break;
    }
  }
}

// ---- the step ----

struct Call {
  const Model& model;
  const int64_t* ids;     // [batch]
  const int64_t* starts;  // [batch] first slot that isn't padding
  int64_t batch, slot;    // of the new tokens; slots before it are filled
  float* logits;          // [batch, vocab]
  double* seconds;        // [PARTS] or null
  float *x, *q, *k, *v, *attended, *sums;  // shared by all threads
  int threads;
};

template <typename Op>
class Worker {
 public:
  typedef typename Op::Weight Weight;

  Worker(const Call& call, int thread) : call_(call), model_(call.model), thread_(thread) {}

  void run() {
    clock_ = now();
    const Weight* table = static_cast<const Weight*>(model_.embedding);
    const int64_t hidden = model_.hidden;
    if (thread_ == 0)
      for (int64_t b = 0; b < call_.batch; ++b) {
        float* x = call_.x + b * hidden;
        const Weight* row = table + call_.ids[b] * hidden;
        for (int64_t i = 0; i < hidden; ++i) x[i] = load(row[i]);
        if (model_.normalize_embeddings) normalise<Weight>(x, nullptr, x, hidden, model_.eps);
      }
    wait();
    for (int64_t l = 0; l < model_.num_layers; ++l) {
      const Layer& layer = model_.layers[l];
      attention(layer);
      mlp(layer);
    }
    normalised(model_.norm);
    const int64_t vocab = model_.vocab;
    times<Op>(model_.lm_head, input_, first(vocab), first(vocab, 1), {call_.logits, vocab});
    wait();
    count(LM_HEAD);
  }

 private:
  static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
  void count(Part part) {
    if (call_.seconds == nullptr || thread_ != 0) return;
    const double time = now();
    call_.seconds[part] += time - clock_;
    clock_ = time;
  }
  void wait() const {
    if (call_.threads > 1) {
#pragma omp barrier
    }
  }
  // This thread's share of `total` rows begins here; with 1, that of the next thread. Shares are multiples of 4 rows.
  int64_t first(int64_t total, int next = 0) const {
    const int64_t share = thread_ + next;
    return share == call_.threads ? total : total * share / call_.threads / 4 * 4;
  }

  void normalised(const void* weight) {
    const int64_t hidden = model_.hidden;
    float* to = input_.get(call_.batch, hidden);
    for (int64_t b = 0; b < call_.batch; ++b)
      normalise(call_.x + b * hidden, static_cast<const Weight*>(weight), to + b * hidden, hidden, model_.eps);
    input_.ready();
  }

  void attention(const Layer& layer) {
    const int64_t width = model_.heads * model_.head_dim, kv_width = model_.kv_heads * model_.head_dim;
    normalised(layer.attention_norm);
    const bool mixture = layer.attention.experts > 0;
    if (mixture) {
      route<Weight>(layer.attention, input_.rows(static_cast<const float*>(nullptr)), call_.batch, model_.hidden, kept_);
      queries_of_kept(layer);
    } else {
      times<Op>(layer.q, input_, first(width), first(width, 1), {call_.q, width});
    }
    times<Op>(layer.k, input_, first(kv_width), first(kv_width, 1), {call_.k, kv_width});
    times<Op>(layer.v, input_, first(kv_width), first(kv_width, 1), {call_.v, kv_width});
    wait();
    count(ATTENTION_PROJECTIONS);
    for (int64_t task = thread_; task < call_.batch * model_.kv_heads; task += call_.threads)
      heads_of(layer, task / model_.kv_heads, task % model_.kv_heads);
    wait();
    count(ATTENTION);
    if (mixture) {
      outputs_of_kept(layer);
    } else {
      const int64_t hidden = model_.hidden;
      std::copy(call_.attended, call_.attended + call_.batch * width, input_.get(call_.batch, width));
      input_.ready();
      times<Op>(layer.o, input_, first(hidden), first(hidden, 1), {call_.x, hidden, true});
    }
    wait();
    count(ATTENTION_PROJECTIONS);
  }

  // Where the head stands that is the g-th of KV head `kv`, counted over all experts in a mixture of heads.
  int64_t head_at(const Layer& layer, int64_t kv, int64_t g) const {
    const int64_t groups = model_.heads / model_.kv_heads;
    return model_.head_dim * (layer.attention.experts ? g * model_.kv_heads + kv : kv * groups + g);
  }

  void heads_of(const Layer& layer, int64_t b, int64_t kv) {
    const int64_t size = model_.head_dim, groups = model_.heads / model_.kv_heads;
    const int64_t width = model_.heads * size, kv_width = model_.kv_heads * size;
    const int64_t start = call_.starts[b], position = call_.slot, length = call_.slot + 1 - start;
    const int64_t offset = (b * model_.kv_heads + kv) * model_.slots * size;
    Weight* keys = static_cast<Weight*>(layer.keys) + offset;
    Weight* values = static_cast<Weight*>(layer.values) + offset;
    float* work = work_.get(size + groups * length);
    typename Op::Input* queries = queries_.get(groups * size);
    const Weight* q_norm = static_cast<const Weight*>(layer.q_norm);
    const Weight* k_norm = static_cast<const Weight*>(layer.k_norm);
    const bool full = model_.qk_norm == 1;

    const float* k = call_.k + b * kv_width;
    const float k_factor = full ? 1.0f / std::sqrt(dot(k, k, kv_width) / kv_width + model_.eps) : 1.0f;
    head(k + kv * size, k_norm, kv * size, k_factor, position, 1.0f, work);
    for (int64_t i = 0; i < size; ++i) {
      store(keys[call_.slot * size + i], work[i]);
      store(values[call_.slot * size + i], call_.v[b * kv_width + kv * size + i]);
    }
    const float* q = call_.q + b * width;
    const float q_factor = full ? 1.0f / std::sqrt(dot(q, q, width) / width + model_.eps) : 1.0f;
    float** out = out_.get(groups);
    int64_t heads = 0;
    for (int64_t g = 0; g < groups; ++g) {
      if (layer.attention.experts && (g >= layer.attention.stored || !keeps(layer.attention, b, g))) continue;
      const int64_t at = head_at(layer, kv, g);
      head(q + at, q_norm, at, q_factor, position, 1.0f / std::sqrt(static_cast<float>(size)), work);
      for (int64_t i = 0; i < size; ++i) store(queries[heads * size + i], work[i]);
      out[heads++] = call_.attended + b * width + at;
    }
    attend<Op>(queries, heads, keys, values, start, call_.slot + 1, size, work + size, out);
  }

  // One head, normalised as the model does it, rotated and scaled. `at`: where it stands among all.
  void head(const float* from, const Weight* norm, int64_t at, float full_factor, int64_t position, float factor, float* to) {
    const int64_t size = model_.head_dim;
    if (model_.qk_norm != 1)
      return prepare_head<Weight>(model_, from, norm, position, factor, model_.eps, to);
    float* normed = head_.get(size);
    for (int64_t i = 0; i < size; ++i) normed[i] = from[i] * full_factor * load(norm[at + i]);
    prepare_head<Weight>(model_, normed, nullptr, position, factor, model_.eps, to);
  }

  bool keeps(const Routing& routing, int64_t b, int64_t expert) const {
    return kept_.mask == nullptr || kept_.mask[b * routing.stored + expert] != 0;
  }

  // Calls `use` with each stored attention expert and the tokens that keep it.
  template <typename Use>
  void each_expert(const Routing& routing, const Use& use) {
    int64_t* tokens = tokens_.get(call_.batch);
    for (int64_t e = 0; e < routing.stored; ++e) {
      int64_t count = 0;
      for (int64_t b = 0; b < call_.batch; ++b)
        if (keeps(routing, b, e)) tokens[count++] = b;
      if (count) use(e, tokens, count);
    }
  }

  void queries_of_kept(const Layer& layer) {
    const int64_t width = model_.heads * model_.head_dim, rows = model_.kv_heads * model_.head_dim;
    const auto all = input_.rows(static_cast<const typename Op::Input*>(nullptr));
    each_expert(layer.attention, [&](int64_t e, const int64_t* tokens, int64_t count) {
      auto x = rows_.get(count);
      for (int64_t i = 0; i < count; ++i) x[i] = all[tokens[i]];
      product<Op>(static_cast<const Weight*>(layer.q.data) + e * rows * model_.hidden, nullptr, model_.hidden, first(rows),
                  first(rows, 1), x, count, {call_.q + e * rows, width, false, tokens});
    });
  }

  // Each thread takes some columns of the residual stream.
  void outputs_of_kept(const Layer& layer) {
    const int64_t hidden = model_.hidden, width = model_.heads * model_.head_dim;
    const int64_t rows = model_.kv_heads * model_.head_dim, from = first(hidden), to = first(hidden, 1);
    each_expert(layer.attention, [&](int64_t e, const int64_t* tokens, int64_t count) {
      const Weight* weight = static_cast<const Weight*>(layer.o.data) + e * rows * hidden;
      for (int64_t w = 0; w < rows; ++w, weight += hidden)
        for (int64_t i = 0; i < count; ++i) {
          const int64_t b = tokens[i];
          Weight rounded;  // as the heads' outputs are, and the gated ones
          store(rounded, call_.attended[b * width + e * rows + w]);
          store(rounded, load(rounded) * kept_.gates[b * layer.attention.stored + e]);
          const float a = load(rounded);
          float* x = call_.x + b * hidden;
          int64_t d = from;
          for (; d + LANES <= to; d += LANES) store_vec(x + d, load_vec(x + d) + widen(weight + d) * a);
          for (; d < to; ++d) x[d] += load(weight[d]) * a;
        }
    });
  }

  void mlp(const Layer& layer) {
    normalised(layer.mlp_norm);
    const Routing& routing = layer.mlp;
    const bool routed = routing.experts > 0;
    if (routed)
      route<Weight>(routing, input_.rows(static_cast<const float*>(nullptr)), call_.batch, model_.hidden, kept_);
    const int64_t total = call_.batch * model_.hidden;
    const bool alone = call_.threads == 1;
    float* y = alone ? call_.x : call_.sums + thread_ * total;  // alone: added to the residual stream right away
    if (!alone) std::fill(y, y + total, 0.0f);
    const float* gates = routed ? kept_.gates : nullptr;
    const uint8_t* mask = routed ? kept_.mask : nullptr;
    if (layer.up.scales != nullptr) {
      share<Int8>(layer, gates, mask, y);
    } else {
      share<Op>(layer, gates, mask, y);
    }
    wait();
    if (!alone) {
      for (int s = 0; s < call_.threads; ++s)
        for (int64_t i = first(total); i < first(total, 1); ++i) call_.x[i] += call_.sums[s * total + i];
      wait();
    }
    count(MLP);
  }

  template <typename Given>
  void share(const Layer& layer, const float* gates, const uint8_t* mask, float* y) {
    typedef typename Given::Weight Type;
    const Shape shape = {call_.batch, std::max<int64_t>(1, layer.mlp.stored), model_.hidden, model_.width,
                         model_.swiglu != 0};
    const Expert<Given> all = {static_cast<const Type*>(layer.up.data), static_cast<const Type*>(layer.down.data),
                               layer.up.scales, layer.down.scales};
    block_share<Given>(shape, input_.flat(static_cast<const typename Given::Input*>(nullptr)), gates, mask, all, y,
                       thread_, call_.threads);
  }

  const Call& call_;
  const Model& model_;
  const int thread_;
  double clock_ = 0;
  // kept by the thread from call to call
  static thread_local Inputs<Op> input_;
  static thread_local Kept_experts kept_;
  static thread_local Scratch<float> work_, head_;
  static thread_local Scratch<typename Op::Input> queries_;
  static thread_local Scratch<float*> out_;
  static thread_local Scratch<int64_t> tokens_;
  static thread_local Scratch<const typename Op::Input*> rows_;
};

template <typename Op> thread_local Inputs<Op> Worker<Op>::input_;
template <typename Op> thread_local Kept_experts Worker<Op>::kept_;
template <typename Op> thread_local Scratch<float> Worker<Op>::work_;
template <typename Op> thread_local Scratch<float> Worker<Op>::head_;
template <typename Op> thread_local Scratch<typename Op::Input> Worker<Op>::queries_;
template <typename Op> thread_local Scratch<float*> Worker<Op>::out_;
template <typename Op> thread_local Scratch<int64_t> Worker<Op>::tokens_;
template <typename Op> thread_local Scratch<const typename Op::Input*> Worker<Op>::rows_;

template <typename Op>
void step(const Model* model, const int64_t* ids, const int64_t* starts, int64_t batch, int64_t slot, float* logits,
          double* seconds, int threads) {
  const int64_t hidden = batch * model->hidden, q = batch * model->heads * model->head_dim;
  const int64_t kv = batch * model->kv_heads * model->head_dim;
  thread_local Scratch<float> memory;
  float* shared = memory.get(hidden * (1 + threads) + 2 * q + 2 * kv);
  Call call = {*model, ids, starts, batch, slot, logits, seconds};
  call.threads = threads;
  for (auto part : {std::make_pair(&call.x, hidden), {&call.q, q}, {&call.attended, q}, {&call.k, kv}, {&call.v, kv},
                    {&call.sums, hidden * threads}}) {
    *part.first = shared;
    shared += part.second;
  }
  if (threads == 1) return Worker<Op>(call, 0).run();
#pragma omp parallel num_threads(threads)
  {
    // the system may give fewer threads than it was asked for
#pragma omp single
    call.threads = omp_get_num_threads();
    Worker<Op>(call, omp_get_thread_num()).run();
  }
}

}  // namespace

extern "C" {

void dsmoe_decode_float32(const void* model, const int64_t* ids, const int64_t* starts, int64_t batch, int64_t slot,
                          float* logits, double* seconds, int threads) {
  step<Float>(static_cast<const Model*>(model), ids, starts, batch, slot, logits, seconds, threads);
}

void dsmoe_decode_bfloat16(const void* model, const int64_t* ids, const int64_t* starts, int64_t batch, int64_t slot,
                           float* logits, double* seconds, int threads) {
  step<Bfloat16>(static_cast<const Model*>(model), ids, starts, batch, slot, logits, seconds, threads);
}

// Sizes of the structs, for a check of those in decoder.py.
void dsmoe_decode_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Routing), sizes[1] = sizeof(Layer), sizes[2] = sizeof(Model);
}

}  // extern "C"
