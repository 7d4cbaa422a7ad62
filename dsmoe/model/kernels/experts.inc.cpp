// Gated experts for inference: the kept (token, expert) pairs of one share of the work. Included by the other sources,
// not compiled by itself. sparse_experts.cpp says what is computed and how.

#pragma once

#include "vectors.inc.cpp"

namespace {

constexpr int FEW = 8;            // largest number of tokens of an expert that are computed the first way
// Sums are held in registers: 24 of 32, or 12 of 16.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int ROWS = 4, TILE_TOKENS = 4, TILE_VECTORS = 3;
#else
constexpr int ROWS = 8;          // rows of up at a time in the first product: as many gate as up rows with swiglu
constexpr int TILE_TOKENS = 6;   // tokens and
constexpr int TILE_VECTORS = 4;  // vectors at a time in the second product
#endif
constexpr int PANEL_VECTORS = 3;  // vectors of tokens at a time in the first product
constexpr int PANEL_TOKENS = PANEL_VECTORS * LANES;
constexpr int TILE = TILE_VECTORS * LANES;
constexpr int64_t MANY_UNITS = 128;  // hidden units whose activations are held at a time
constexpr int64_t STAGE_PADDING = 16;  // rows a multiple of 4096 bytes apart would share cache lines

struct Shape {
  int64_t tokens, experts, hidden, width;
  bool swiglu;
  int64_t up_rows() const { return swiglu ? 2 * width : width; }
};

inline void activate(const float* gate, const float* up, const float* weight, float* out, int64_t count, bool swiglu) {
  if (swiglu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i] * weight[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float bell;
      out[i] = gate[i] * normal_cdf(gate[i], bell) * weight[i];
    }
  }
}

// The tokens of a block that keep an expert.
template <typename Op>
struct Kept {
  const typename Op::Input* const* x;  // rows of x
  float* const* y;                     // rows of the sums
  const float* gates;
  int64_t count;
};

// The matrices of one expert or of all, and the factors of their rows where weights are scaled.
template <typename Op>
struct Expert {
  const typename Op::Weight* up;
  const typename Op::Weight* down;
  const float* up_scales;
  const float* down_scales;
};

template <typename Op>
inline float scale_of(const float* scales, int64_t row) {
  return Op::SCALED ? scales[row] : 1.0f;
}

// ---- few tokens ----

// Dot products of R rows of weights with T vectors; asks for as many lines of the rows `ahead` meanwhile.
template <typename Op, int R, int T>
inline void dot_rows(const typename Op::Weight* const* rows, const typename Op::Input* const* x, int64_t size,
                     const typename Op::Weight* const* ahead, float (*result)[FEW]) {
  vec sums[R][T] = {};
  int64_t d = 0;
  for (; d + Op::CHUNK <= size; d += Op::CHUNK) {
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + d, 0, 2);
    vec w[R];
    for (int r = 0; r < R; ++r) w[r] = Op::load_weight(rows[r] + d);
    for (int t = 0; t < T; ++t) {
      const vec v = Op::load_input(x[t] + d);
      for (int r = 0; r < R; ++r) sums[r][t] = Op::madd(sums[r][t], w[r], v);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) {
      float total = sum(sums[r][t]);
      for (int64_t i = d; i < size; ++i) total += load(rows[r][i]) * load(x[t][i]);
      result[r][t] = total;
    }
}

// Hidden units [first, last) of one expert for T tokens. `next` is where the work goes on afterwards.
//
// Each row is asked for while the row of the same kind of the block before is used: so memory delivers evenly, as many
// bytes as are read, and all of them a block ahead.
template <typename Op, int T>
void few_tokens(const Shape& shape, const Expert<Op>& expert, const Kept<Op>& kept, int64_t first, int64_t last,
                const Expert<Op>& next) {
  typedef typename Op::Weight Weight;
  // hidden units at a time: many spare reading and writing y
  constexpr int UNITS = 4;
  const int64_t size = shape.hidden;
  for (int64_t f = first; f < last; f += UNITS) {
    const int units = static_cast<int>(std::min<int64_t>(UNITS, last - f));
    const Weight* gate_rows = expert.up + f * size;
    const Weight* up_rows = shape.swiglu ? gate_rows + shape.width * size : gate_rows;
    const Weight* down_rows = expert.down + f * size;
    const bool more = f + UNITS < last;
    const Weight* next_gate = more ? gate_rows + UNITS * size : next.up;
    const Weight* next_up = next_gate + (up_rows - gate_rows);
    const Weight* next_down = more ? down_rows + UNITS * size : next.down;
    float gate[UNITS][FEW], up[UNITS][FEW], act[UNITS][FEW];
    for (int i = 0; i < units; ++i) {
      const Weight* rows[2] = {gate_rows + i * size, up_rows + i * size};
      const Weight* ahead[2] = {next_gate + i * size, next_up + i * size};
      float h[2][FEW] = {};
      if (shape.swiglu) {
        dot_rows<Op, 2, T>(rows, kept.x, size, ahead, h);
      } else {
        dot_rows<Op, 1, T>(rows, kept.x, size, ahead, h);
      }
      const float gate_scale = scale_of<Op>(expert.up_scales, f + i);
      const float up_scale = shape.swiglu ? scale_of<Op>(expert.up_scales, shape.width + f + i) : 1.0f;
      for (int t = 0; t < T; ++t) gate[i][t] = h[0][t] * gate_scale, up[i][t] = h[1][t] * up_scale;
    }
    for (int i = 0; i < UNITS; ++i) {
      if (i < units) {
        activate(gate[i], up[i], kept.gates, act[i], T, shape.swiglu);
        if (Op::SCALED)
          for (int t = 0; t < T; ++t) act[i][t] *= expert.down_scales[f + i];
      } else {
        for (int t = 0; t < T; ++t) act[i][t] = 0.0f;
      }
    }
    // a row that is not there is row 0 again, times zero
    const Weight* rows[UNITS];
    for (int i = 0; i < UNITS; ++i) rows[i] = down_rows + (i < units ? i : 0) * size;
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
      vec w[UNITS];
      for (int i = 0; i < UNITS; ++i) {
        w[i] = widen(rows[i] + d);
        __builtin_prefetch(next_down + i * size + d, 0, 2);
      }
      for (int t = 0; t < T; ++t) {
        vec y = load_vec(kept.y[t] + d);
        for (int i = 0; i < UNITS; ++i) y += w[i] * act[i][t];
        store_vec(kept.y[t] + d, y);
      }
    }
    for (; d < size; ++d)
      for (int t = 0; t < T; ++t)
        for (int i = 0; i < units; ++i) kept.y[t][d] += load(rows[i][d]) * act[i][t];
  }
}

// ---- many tokens ----

// 16 x 16 (LANES x LANES) transposition of 32-bit numbers.
inline void transpose(const float* const* rows, int64_t offset, float* out, int64_t stride) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + offset);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(out + (i + 4) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
#else
  for (int k = 0; k < LANES; ++k)
    for (int i = 0; i < LANES; ++i) out[k * stride + i] = rows[i][offset + k];
#endif
}

// x of a panel of `count` tokens as [depth][PANEL_TOKENS] 32-bit numbers; those that fill up the last vector repeat a token.
template <typename Op>
void pack_tokens(const typename Op::Input* const* x, int64_t count, int64_t depth, float* out) {
  for (int64_t first = 0; first < count; first += LANES) {
    const float* rows[LANES];
    for (int i = 0; i < LANES; ++i)
      rows[i] = reinterpret_cast<const float*>(x[std::min<int64_t>(first + i, count - 1)]);
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) transpose(rows, k, out + k * PANEL_TOKENS + first, PANEL_TOKENS);
    for (; k < depth; ++k)
      for (int i = 0; i < LANES; ++i) std::memcpy(out + k * PANEL_TOKENS + first + i, rows[i] + k, 4);
  }
}

// One row of up as 32-bit numbers for the first product.
template <typename Op>
inline void stage_row(const typename Op::Weight* row, float scale, float* out, int64_t depth) {
  if (sizeof(typename Op::Weight) * Op::PAIR == 4) {
    std::memcpy(out, row, 4 * depth);
  } else {
    for (int64_t d = 0; d < depth; ++d) out[d] = load(row[d]) * scale;
  }
}

// Products of ROWS staged rows with V vectors of tokens.
template <typename Op, int V>
inline void first_product(const float* x, const float* rows, int64_t row_stride, int64_t depth, float (*out)[PANEL_TOKENS]) {
  vec sums[ROWS][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec v[V];
    for (int i = 0; i < V; ++i) v[i] = load_vec(x + k * PANEL_TOKENS + i * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec w = broadcast(rows[r * row_stride + k]);
      for (int i = 0; i < V; ++i) sums[r][i] = Op::madd(sums[r][i], v[i], w);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < V; ++i) store_vec(out[r] + i * LANES, sums[r][i]);
}

// Two rows of activations as pairs of bfloat16.
inline void store_pairs(const float* even, const float* odd, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    bfloat16 low, high;
    store(low, even[i]);
    store(high, odd[i]);
    out[i] = bit_cast<float>(static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16);
  }
}

// Columns [d, d + TILE) of rows [0, units) of down as [rows of 32-bit numbers][TILE]; what isn't there is zero.
template <typename Op>
inline void pack_down(const typename Op::Weight* down, const float* scales, int64_t size, int64_t d, int64_t units, int64_t padded,
                      float* out) {
  const int64_t columns = std::min<int64_t>(TILE, size - d);
  for (int64_t f = 0; f < padded; f += Op::PAIR, out += TILE) {
    const typename Op::Weight* row = down + f * size + d;
    if (columns < TILE || f + Op::PAIR > units) std::memset(out, 0, 4 * TILE);
    if (f >= units) continue;
    if (Op::PAIR == 1) {
      const float scale = scale_of<Op>(scales, f);
      for (int64_t i = 0; i < columns; ++i) out[i] = load(row[i]) * scale;
    } else {
      const bool both = f + 1 < units;
      const auto* even = reinterpret_cast<const uint16_t*>(row);
      const auto* odd = reinterpret_cast<const uint16_t*>(both ? row + size : row);
      const uint32_t mask = both ? 0xffff0000u : 0u;
      auto* bits = reinterpret_cast<uint32_t*>(out);
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i)
        bits[i] = static_cast<uint32_t>(even[i]) | ((static_cast<uint32_t>(odd[i]) << 16) & mask);
    }
  }
}

// Sums of T tokens over `depth` products, for the columns of one tile.
template <typename Op, int T>
inline void second_product(const float* act, int64_t stride, const float* down, int64_t depth, float* const* y,
                           int64_t d, int64_t columns) {
  for (int t = 0; t < T; ++t)  // rows of tokens are anywhere
    for (int i = 0; i < TILE_VECTORS; ++i) __builtin_prefetch(y[t] + d + i * LANES, 1, 3);
  vec sums[T][TILE_VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec w[TILE_VECTORS];
    for (int i = 0; i < TILE_VECTORS; ++i) w[i] = load_vec(down + k * TILE + i * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const vec a = broadcast(act[k * stride + t]);
      for (int i = 0; i < TILE_VECTORS; ++i) sums[t][i] = Op::madd(sums[t][i], w[i], a);
    }
  }
  for (int t = 0; t < T; ++t) {
    float* row = y[t] + d;
    if (columns == TILE) {
      for (int i = 0; i < TILE_VECTORS; ++i) store_vec(row + i * LANES, load_vec(row + i * LANES) + sums[t][i]);
    } else {
      float all[TILE];
      for (int i = 0; i < TILE_VECTORS; ++i) store_vec(all + i * LANES, sums[t][i]);
      for (int64_t i = 0; i < columns; ++i) row[i] += all[i];
    }
  }
}

// Asks for one part out of `parts` of memory that is read soon.
inline void ask(const void* memory, int64_t bytes, int64_t part, int64_t parts) {
  const char* first = static_cast<const char*>(memory);
  for (int64_t b = bytes * part / parts; b < bytes * (part + 1) / parts; b += 64) __builtin_prefetch(first + b, 0, 2);
}

// Hidden units [first, last) of one expert for `count` tokens, whose x is packed panel by panel ([depth][PANEL_TOKENS]).
template <typename Op>
void panel(const Shape& shape, const Expert<Op>& expert, const Kept<Op>& kept, const float* x, int64_t stride,
           int64_t first, int64_t last) {
  thread_local Scratch<float> stage_memory, act_memory, down_memory;
  const int64_t depth = shape.hidden / Op::PAIR, row_stride = depth + STAGE_PADDING;
  const int64_t step = shape.swiglu ? ROWS / 2 : ROWS;
  const int64_t padded = (last - first + step - 1) / step * step;
  const int64_t rows_bytes = step * shape.hidden * static_cast<int64_t>(sizeof(typename Op::Weight));
  const int64_t panels = (kept.count + PANEL_TOKENS - 1) / PANEL_TOKENS;
  float* stage = stage_memory.get(ROWS * row_stride);
  float* act = act_memory.get(padded / Op::PAIR * stride);
  float* down = down_memory.get(padded / Op::PAIR * TILE);
  for (int64_t f = first; f < last; f += step) {
    for (int r = 0; r < ROWS; ++r) {
      const int64_t unit = std::min(f + r % step, last - 1) + (r < step ? 0 : shape.width);
      stage_row<Op>(expert.up + unit * shape.hidden, scale_of<Op>(expert.up_scales, unit), stage + r * row_stride, depth);
    }
    for (int64_t t = 0; t < kept.count; t += PANEL_TOKENS) {
      float h[ROWS][PANEL_TOKENS], a[ROWS][PANEL_TOKENS], gates[PANEL_TOKENS] = {};
      const int64_t tokens = std::min<int64_t>(PANEL_TOKENS, kept.count - t);
      const int64_t vectors = (tokens + LANES - 1) / LANES;
      // each panel asks for a part of the next step's rows and of this step's rows of down: asked for at once, they would be waited for
      const int64_t number = t / PANEL_TOKENS;
      for (int64_t side = 0; f + step < last && side < ROWS / step; ++side)
        ask(expert.up + (f + step + side * shape.width) * shape.hidden, rows_bytes, number, panels);
      ask(expert.down + f * shape.hidden, rows_bytes, number, panels);
      const float* panel_x = x + t * depth;
      if (vectors == 3) first_product<Op, 3>(panel_x, stage, row_stride, depth, h);
      if (vectors == 2) first_product<Op, 2>(panel_x, stage, row_stride, depth, h);
      if (vectors == 1) first_product<Op, 1>(panel_x, stage, row_stride, depth, h);
      std::copy(kept.gates + t, kept.gates + t + tokens, gates);
      for (int64_t i = 0; i < step; ++i) {
        if (f + i < last) {
          activate(h[i], h[(i + step) % ROWS], gates, a[i], vectors * LANES, shape.swiglu);
        } else {
          std::fill(a[i], a[i] + vectors * LANES, 0.0f);
        }
      }
      float* to = act + (f - first) / Op::PAIR * stride + t;
      for (int64_t i = 0; i < step; i += Op::PAIR, to += stride) {
        if (Op::PAIR == 1) std::copy(a[i], a[i] + vectors * LANES, to);
        if (Op::PAIR == 2) store_pairs(a[i], a[i + 1], to, vectors * LANES);
      }
    }
  }
  for (int64_t d = 0; d < shape.hidden; d += TILE) {
    pack_down<Op>(expert.down + first * shape.hidden, Op::SCALED ? expert.down_scales + first : nullptr, shape.hidden, d, last - first, padded, down);
    const int64_t columns = std::min<int64_t>(TILE, shape.hidden - d);
    int64_t t = 0;
    for (; t + TILE_TOKENS <= kept.count; t += TILE_TOKENS)
      second_product<Op, TILE_TOKENS>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
    const int64_t left = kept.count - t;
    if (left == 5) second_product<Op, 5>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
    if (left == 4) second_product<Op, 4>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
    if (left == 3) second_product<Op, 3>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
    if (left == 2) second_product<Op, 2>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
    if (left == 1) second_product<Op, 1>(act + t, stride, down, padded / Op::PAIR, kept.y + t, d, columns);
  }
}

template <typename Op>
void many_tokens(const Shape& shape, const Expert<Op>& expert, const Kept<Op>& kept, int64_t first, int64_t last) {
  thread_local Scratch<float> x_memory;
  const int64_t depth = shape.hidden / Op::PAIR;
  // packed x stays in the second-level cache
  const int64_t largest = std::max<int64_t>(1, std::min<int64_t>(4, (200 << 10) / (depth * PANEL_TOKENS))) * PANEL_TOKENS;
  for (int64_t t = 0; t < kept.count; t += largest) {
    const Kept<Op> part = {kept.x + t, kept.y + t, kept.gates + t, std::min(largest, kept.count - t)};
    const int64_t stride = (part.count + LANES - 1) / LANES * LANES;
    float* x = x_memory.get(depth * largest);
    for (int64_t p = 0; p < part.count; p += PANEL_TOKENS)
      pack_tokens<Op>(part.x + p, std::min<int64_t>(PANEL_TOKENS, part.count - p), depth, x + p * depth);
    for (int64_t f = first; f < last; f += MANY_UNITS)
      panel<Op>(shape, expert, part, x, stride, f, std::min(f + MANY_UNITS, last));
  }
}

// ---- who computes what ----

template <typename Op>
void compute(const Shape& shape, const Expert<Op>& expert, const Kept<Op>& kept, int64_t first, int64_t last,
             const Expert<Op>& next) {
  switch (kept.count) {
    case 1: return few_tokens<Op, 1>(shape, expert, kept, first, last, next);
    case 2: return few_tokens<Op, 2>(shape, expert, kept, first, last, next);
    case 3: return few_tokens<Op, 3>(shape, expert, kept, first, last, next);
    case 4: return few_tokens<Op, 4>(shape, expert, kept, first, last, next);
    case 5: return few_tokens<Op, 5>(shape, expert, kept, first, last, next);
    case 6: return few_tokens<Op, 6>(shape, expert, kept, first, last, next);
    case 7: return few_tokens<Op, 7>(shape, expert, kept, first, last, next);
    case 8: return few_tokens<Op, 8>(shape, expert, kept, first, last, next);
#if defined(DSMOE_FEW_TOKENS_ONLY)
    default:
      for (int64_t t = 0; t < kept.count; t += FEW)
        compute<Op>(shape, expert, {kept.x + t, kept.y + t, kept.gates + t, std::min<int64_t>(FEW, kept.count - t)},
                    first, last, next);
#else
    default: return many_tokens<Op>(shape, expert, kept, first, last);
#endif
  }
}

// One share out of `shares` of the work for a block of tokens: a run of hidden units, counted over all experts.
template <typename Op>
void block_share(const Shape& shape, const typename Op::Input* x, const float* gates, const uint8_t* mask,
                 const Expert<Op>& all, float* y, int share, int shares) {
  typedef typename Op::Input Input;
  thread_local Scratch<int64_t> start_memory;
  thread_local Scratch<const Input*> x_memory;
  thread_local Scratch<float*> y_memory;
  thread_local Scratch<float> gate_memory;
  const int64_t experts = shape.experts;
  int64_t* starts = start_memory.get(2 * experts + 1);
  int64_t* fill = starts + experts + 1;
  std::fill(starts, starts + 2 * experts + 1, 0);
  for (int64_t t = 0; t < shape.tokens; ++t)
    for (int64_t e = 0; e < experts; ++e) starts[e + 1] += mask == nullptr || mask[t * experts + e] != 0;
  const auto cost_of = [](int64_t tokens) { return tokens == 0 ? 0 : std::max<int64_t>(tokens, FEW); };
  int64_t cost = 0;
  for (int64_t e = 0; e < experts; ++e) {
    cost += cost_of(starts[e + 1]);
    starts[e + 1] += starts[e];
    fill[e] = starts[e];
  }
  const Input** xs = x_memory.get(starts[experts]);
  float** ys = y_memory.get(starts[experts]);
  float* weights = gate_memory.get(starts[experts]);
  for (int64_t t = 0; t < shape.tokens; ++t)
    for (int64_t e = 0; e < experts; ++e)
      if (mask == nullptr || mask[t * experts + e] != 0) {
        const int64_t p = fill[e]++;
        xs[p] = x + t * shape.hidden;
        ys[p] = y + t * shape.hidden;
        weights[p] = gates == nullptr ? 1.0f : gates[t * experts + e];
      }

  const int64_t units = (shape.width + ROWS - 1) / ROWS;  // runs begin and end at multiples of ROWS
  const int64_t begin = cost * units * share / shares, end = cost * units * (share + 1) / shares;
  const int64_t up_size = shape.up_rows() * shape.hidden, down_size = shape.width * shape.hidden;
  const auto expert_at = [&](int64_t e) -> Expert<Op> {
    return {all.up + e * up_size, all.down + e * down_size,
            Op::SCALED ? all.up_scales + e * shape.up_rows() : nullptr,
            Op::SCALED ? all.down_scales + e * shape.width : nullptr};
  };
  int64_t before = 0;
  const auto clip = [&](int64_t position, int64_t each) {
    const int64_t unit = each ? (position - before + each - 1) / each : 0;
    return std::min(std::max<int64_t>(unit, 0) * ROWS, shape.width);
  };
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t each = cost_of(starts[e + 1] - starts[e]);
    if (each == 0) continue;
    const int64_t first = before >= begin ? 0 : clip(begin, each), last = clip(end, each);
    before += each * units;
    if (first >= last) continue;
    int64_t next = e + 1;
    while (next < experts && starts[next + 1] == starts[next]) ++next;
    const Kept<Op> kept = {xs + starts[e], ys + starts[e], weights + starts[e], starts[e + 1] - starts[e]};
    compute<Op>(shape, expert_at(e), kept, first, last, expert_at(next < experts ? next : e));
  }
}

}  // namespace
