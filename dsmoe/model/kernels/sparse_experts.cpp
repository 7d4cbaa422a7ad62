// Forward pass of gated experts for inference on CPU, computing the kept (token, expert) pairs only: from the mask to
// the sum over experts in one call. Plain C++ and OpenMP with a C interface, as in gated_activation.cpp.
//
// out[t] = sum over the kept experts e of gate[t, e] * down[e]^T act(up[e] x[t])
//
// up is [N, H, D] with H = 2F (swiglu: F gate rows, then F up rows) or F (gelu), down is [N, F, D]: the vectors of a
// hidden unit are contiguous rows. Two ways to compute an expert, by the number of tokens that keep it:
//   few   each weight is read once from memory and used for all of these tokens (bound by memory bandwidth): dot
//         products with the rows of up, multiples of the rows of down.
//   many  blocked matrix products. A vector holds one number of each of 16 tokens in the first product (so x is
//         transposed, and weights are broadcast) and 16 numbers of one token in the second; the activation comes in between.
// int8 weights have one float32 factor for each row of up and down; x stays as it is.
// bfloat16 weights use the processor's bfloat16 dot products where it has them and are widened to float32 otherwise.
// Sums are float32 everywhere.

#include "experts.inc.cpp"

namespace {

inline void to_output(const float* from, float* to, int64_t count) {
  if (from != to) std::memcpy(to, from, sizeof(float) * count);
}
inline void to_output(const float* from, bfloat16* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

inline const float* as_input(const float* x, int64_t, const float*) { return x; }
inline const bfloat16* as_input(const bfloat16* x, int64_t, const bfloat16*) { return x; }
inline const float* as_input(const bfloat16* x, int64_t count, const float*) {
  thread_local Scratch<float> memory;
  float* wide = memory.get(count);
  for (int64_t i = 0; i < count; ++i) wide[i] = load(x[i]);
  return wide;
}

// Tokens are split into blocks whose sums stay in the cache, and with too few tokens for all threads the work on a
// block is split into shares, each with sums of its own.
template <typename Op, typename Value>
void experts(const Value* x_given, const float* gates, const uint8_t* mask, const Expert<Op>& all, Value* out,
             const Shape& shape, int threads) {
  const int64_t hidden = shape.hidden, tokens = shape.tokens;
  const int64_t largest = std::max<int64_t>(256, (int64_t{1} << 20) / std::max<int64_t>(hidden, 1));
  int64_t blocks = (tokens + largest - 1) / largest;
  if (blocks < threads) blocks = std::min<int64_t>(threads, std::max<int64_t>(1, tokens / 256));
  if (blocks > threads) blocks = (blocks + threads - 1) / threads * threads;
  const int shares = static_cast<int>(std::min<int64_t>(std::max<int64_t>(1, threads / blocks), 16));
  const int64_t length = (tokens + blocks - 1) / blocks;
  const auto* x = as_input(x_given, tokens * hidden, static_cast<const typename Op::Input*>(nullptr));
  thread_local Scratch<float> sum_memory;
  float* sums = nullptr;
  const bool direct = sizeof(Value) == 4 && shares == 1;
  if (direct) {
    sums = reinterpret_cast<float*>(out);
  } else if (shares > 1) {
    sums = sum_memory.get(shares * tokens * hidden);
  }
  const auto task = [&](int64_t number) {
    const int64_t block = number / shares, share = number % shares;
    const int64_t first = block * length, count = std::min(length, tokens - first);
    if (count <= 0) return;
    thread_local Scratch<float> block_memory;
    float* y = sums == nullptr ? block_memory.get(count * hidden) : sums + (share * tokens + first) * hidden;
    std::memset(y, 0, sizeof(float) * count * hidden);
    const Shape part = {count, shape.experts, hidden, shape.width, shape.swiglu};
    block_share<Op>(part, x + first * hidden, gates == nullptr ? nullptr : gates + first * shape.experts,
                    mask == nullptr ? nullptr : mask + first * shape.experts, all, y, static_cast<int>(share), shares);
    if (shares == 1) to_output(y, out + first * hidden, count * hidden);
  };
  const int64_t tasks = blocks * shares;
  if (tasks == 1) return task(0);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < tasks; ++number) task(number);
    if (shares > 1) {
      const int64_t total = tokens * hidden, piece = std::max<int64_t>(64, (total + threads - 1) / threads);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < total; first += piece) {
        const int64_t count = std::min(piece, total - first);
        for (int s = 1; s < shares; ++s) {
          const float* from = sums + s * total + first;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) sums[first + i] += from[i];
        }
        to_output(sums + first, out + first, count);
      }
    }
  }
}

template <typename Op, typename Value>
void call(const void* x, const void* gates, const void* mask, const void* up, const void* down, const void* up_scales,
          const void* down_scales, void* out, const Shape& shape, int threads) {
  typedef typename Op::Weight Weight;
  const Expert<Op> all = {static_cast<const Weight*>(up), static_cast<const Weight*>(down),
                          static_cast<const float*>(up_scales), static_cast<const float*>(down_scales)};
  experts<Op, Value>(static_cast<const Value*>(x), static_cast<const float*>(gates),
                     static_cast<const uint8_t*>(mask), all, static_cast<Value*>(out), shape, threads);
}

}  // namespace

// The name says the type of weights, then that of tokens where it is another.
#define DSMOE_EXPERTS(NAME, OP, VALUE)                                                                                \
  void dsmoe_experts_##NAME(const void* x, const void* gates, const void* mask, const void* up, const void* down,     \
                            const void* up_scales, const void* down_scales, void* out, int64_t tokens,                \
                            int64_t experts, int64_t hidden, int64_t width, int swiglu, int threads) {                \
    call<OP, VALUE>(x, gates, mask, up, down, up_scales, down_scales, out,                                            \
                    {tokens, experts, hidden, width, swiglu != 0}, threads);                                          \
  }

extern "C" {

DSMOE_EXPERTS(float32, Float, float)
DSMOE_EXPERTS(bfloat16, Bfloat16, bfloat16)
DSMOE_EXPERTS(int8_float32, Int8, float)
DSMOE_EXPERTS(int8_bfloat16, Int8, bfloat16)

// Reads `count` floats and returns their sum: the memory bandwidth that the kernels above are held against.
float dsmoe_read(const float* from, int64_t count, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t part = 0; part < threads; ++part) {
    const int64_t first = count * part / threads, last = count * (part + 1) / threads;
    vec sums[4] = {};
    int64_t i = first;
    for (; i + 4 * LANES <= last; i += 4 * LANES)
      for (int s = 0; s < 4; ++s) sums[s] += load_vec(from + i + s * LANES);
    total += sum(sums[0] + sums[1] + sums[2] + sums[3]);
    for (; i < last; ++i) total += from[i];
  }
  return total;
}

// Reads the weights of all experts that a token keeps and returns a sum: the least time that cold weights allow.
float dsmoe_read_experts(const uint8_t* mask, const void* up, const void* down, int64_t tokens, int64_t experts,
                         int64_t up_bytes, int64_t down_bytes, int threads) {
  float total = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : total)
  for (int64_t e = 0; e < experts; ++e) {
    bool kept = false;
    for (int64_t t = 0; t < tokens; ++t) kept |= mask[t * experts + e] != 0;
    if (!kept) continue;
    total += dsmoe_read(reinterpret_cast<const float*>(static_cast<const char*>(up) + e * up_bytes), up_bytes / 4, 1);
    total += dsmoe_read(reinterpret_cast<const float*>(static_cast<const char*>(down) + e * down_bytes), down_bytes / 4, 1);
  }
  return total;
}

}  // extern "C"
