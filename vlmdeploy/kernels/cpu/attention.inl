// Attention, written once over the vectors of an instruction set; included after product.inl.

namespace {

// C [ROWS, N] += A [ROWS, depth] * B [depth, N], each sum from the first to the last of `depth`; values of a row of A: a_step apart.
template <int ROWS, int VECTORS>
inline void multiply_floats(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, int64_t n) {
  int64_t column = 0;
  for (; column + VECTORS * L <= n; column += VECTORS * L) {
    Floats sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sum[r][v] = Isa::load_floats(c + r * c_row + column + v * L);
    for (int64_t k = 0; k < depth; k++) {
      Floats right[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) right[v] = Isa::load_floats(b + k * b_row + column + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const Floats left = Isa::set_float(a[r * a_row + k * a_step]);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Isa::fma(left, right[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) Isa::store_floats(c + r * c_row + column + v * L, sum[r][v]);
  }
  if constexpr (VECTORS > 1)
    if (column < n) multiply_floats<ROWS, VECTORS / 2>(a, a_row, a_step, b + column, b_row, c + column, c_row, depth, n - column);
}

inline void multiply_floats(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                            int64_t n) {
  int64_t row = 0;
  for (; row + Isa::FLOAT_ROWS <= rows; row += Isa::FLOAT_ROWS)
    multiply_floats<Isa::FLOAT_ROWS, Isa::COLUMNS>(a + row * a_row, a_row, a_step, b, b_row, c + row * c_row, c_row, depth, n);
  for (; row < rows; row++) multiply_floats<1, 128 / L>(a + row * a_row, a_row, a_step, b, b_row, c + row * c_row, c_row, depth, n);
}

// ---- the cache ----

inline uint16_t half_of(float value) {
  alignas(64) uint16_t lanes[L];
  Isa::store_halves(lanes, Isa::set_float(value));
  return lanes[0];
}

inline void rotate(const float* x, const float* cos, const float* sin, int64_t width, float factor, float* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i++) {
    const float first = x[i], second = x[half + i];
    out[i] = (first * cos[i] - second * sin[i]) * factor;
    out[half + i] = (second * cos[i] + first * sin[i]) * factor;
  }
}

inline int64_t place_of(const Cache& cache, int64_t head, int64_t slot) { return head * cache.head_stride + slot * cache.slot_stride; }

inline uint16_t* scales_of(const Attention& at, const Cache& cache, int64_t head, int64_t slot) {
  return cache.scales + place_of(cache, head, slot) / CACHE_GROUP;
}

inline void store_row(const Attention& at, const Cache& cache, int64_t head, int64_t slot, const float* x) {
  const int64_t width = at.width, place = place_of(cache, head, slot);
  if (at.stored == Stored::fp32) {
    memcpy((float*)cache.data + place, x, width * 4);
  } else if (at.stored == Stored::fp16) {
    for (int64_t i = 0; i < width; i += L) Isa::store_halves((uint16_t*)cache.data + place + i, Isa::load_floats(x + i));
  } else {
    for (int64_t g = 0; g < width; g += CACHE_GROUP) {
      const float most = Isa::largest(x + g, CACHE_GROUP);
      uint16_t scale = half_of(most / 127.0f);
      if (half_to_float(scale) * 127.0f < most) scale++;  // rounded up, so that no code is above 127
      const bool holds = most <= 127.0f * 65504.0f;       // fp16's largest
      scales_of(at, cache, head, slot)[g / CACHE_GROUP] = holds ? scale : 0x7e00;  // NaN
      Isa::round(x + g, CACHE_GROUP, holds && scale ? 1.0f / half_to_float(scale) : 0, (int8_t*)cache.data + place + g);
    }
  }
}

void write_cache(const Attention& at, int64_t first, int64_t last) {
  alignas(64) float rotated[MOST_WIDTH];
  for (int64_t row = first; row < last; row++) {
    const float* x = at.qkv + row * (at.heads + 2 * at.kv_heads) * at.width + at.heads * at.width;
    const int64_t slot = at.first_slot + row;
    for (int64_t head = 0; head < at.kv_heads; head++, x += at.width) {
      rotate(x, at.cos + slot * at.width / 2, at.sin + slot * at.width / 2, at.width, 1, rotated);
      store_row(at, at.keys, head, slot, rotated);
      store_row(at, at.values, head, slot, x + at.kv_heads * at.width);
    }
  }
}

// The values of one slot; of int8, the codes.
template <Stored STORED>
struct Row {
  const void* data;

  Row() = default;
  Row(const Attention& at, const Cache& cache, int64_t head, int64_t slot) {
    const int64_t place = place_of(cache, head, slot);
    data = STORED == Stored::fp32   ? (const void*)((const float*)cache.data + place)
           : STORED == Stored::fp16 ? (const void*)((const uint16_t*)cache.data + place)
                                    : (const void*)((const int8_t*)cache.data + place);
  }
  Floats load(int64_t column) const {
    if (STORED == Stored::fp32) return Isa::load_floats((const float*)data + column);
    if (STORED == Stored::fp16) return Isa::load_halves((const uint16_t*)data + column);
    return Isa::to_float(Isa::load_bytes((const int8_t*)data + column));
  }
};

// Fetches `bytes` from `from` on into the cache.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

// take(p, values p of the slots that are `held`, and zeros) for L slots of any type.
template <Stored STORED, typename Take>
inline __attribute__((always_inline)) void take_keys(const Attention& at, int64_t head, int64_t first, int64_t held, const Take& take) {
  Row<STORED> rows[L];
  for (int64_t i = 0; i < L && i < held; i++) {
    rows[i] = Row<STORED>(at, at.keys, head, first + i);
    fetch(Row<STORED>(at, at.keys, head, first + i + L).data, at.width * (STORED == Stored::fp32 ? 4 : 2));  // of the next call
  }
  for (int64_t column = 0; column < at.width; column += L) {
    Ints turned[L];
    for (int i = 0; i < L; i++) turned[i] = i < held ? Isa::as_ints(rows[i].load(column)) : Isa::set(0);
    Isa::transpose(turned);
    for (int i = 0; i < L; i++) take(column + i, Isa::as_floats(turned[i]));
  }
}

// Keys of a block, [width, SLOTS], with zeros up to a multiple of L slots.
template <Stored STORED>
inline void keys_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out) {
  for (int64_t slot = 0; slot < count; slot += L)
    take_keys<STORED>(at, head, first + slot, count - slot,
                      [&](int64_t p, Floats values) { Isa::store_floats(out + p * SLOTS + slot, values); });
}

// Scores of a single query, [SLOTS].
template <Stored STORED>
inline void scores_of_one(const Attention& at, int64_t head, int64_t first, int64_t count, const float* query, float* scores) {
  for (int64_t slot = 0; slot < count; slot += L) {
    Floats sum = Isa::set_float(0);
    take_keys<STORED>(at, head, first + slot, count - slot,
                      [&](int64_t p, Floats values) { sum = Isa::fma(Isa::set_float(query[p]), values, sum); });
    Isa::store_floats(scores + slot, sum);
  }
}

// Sums of a single row's weights times values, added to what is there. width: a multiple of 8 * L. weights: [SLOTS], and for int8
// [SLOTS, width / CACHE_GROUP].
template <Stored STORED>
inline void values_of_one(const Attention& at, int64_t head, int64_t first, int64_t count, const float* weights, float* sums) {
  const int64_t groups = at.width / CACHE_GROUP;
  for (int64_t column = 0; column < at.width; column += 8 * L) {
    Floats sum[8];
    for (int v = 0; v < 8; v++) sum[v] = Isa::load_floats(sums + column + v * L);
    for (int64_t slot = 0; slot < count; slot++) {
      const Row<STORED> row(at, at.values, head, first + slot);
#pragma GCC unroll 8
      for (int v = 0; v < 8; v++) {
        const float weight = STORED == Stored::int8 ? weights[slot * groups + (column + v * L) / CACHE_GROUP] : weights[slot];
        sum[v] = Isa::fma(Isa::set_float(weight), row.load(column + v * L), sum[v]);
      }
    }
    for (int v = 0; v < 8; v++) Isa::store_floats(sums + column + v * L, sum[v]);
  }
}

// Values of a block as floats: where they are, or [SLOTS, width] at `out`; `stride` between slots. Of int8, the codes.
template <Stored STORED>
inline const float* values_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out, int64_t& stride) {
  if (STORED == Stored::fp32) {
    stride = at.values.slot_stride;
    return (const float*)at.values.data + place_of(at.values, head, first);
  }
  stride = at.width;
  for (int64_t slot = 0; slot < count; slot++) {
    const Row<STORED> row(at, at.values, head, first + slot);
    for (int64_t column = 0; column < at.width; column += L) Isa::store_floats(out + slot * stride + column, row.load(column));
  }
  return out;
}

// ---- int8: a product of its own for the scores, scales of values as parts of the weights ----

constexpr int CACHE_WORDS = CACHE_GROUP / 4;

// Queries as int8, as the activations of a product are.
struct Queries {
  int8_t* codes;
  float* scales;
  int32_t* sums;
};

// Scores [rows, SLOTS] of rows `from` on with the slots of a block: keys are the weights of a product with signed bytes.
inline void scores_of_int8(const Attention& at, int64_t head, int64_t first, int64_t count, const Queries& queries, int64_t from, int64_t rows,
                           float* scores) {
  const int64_t groups = at.width / CACHE_GROUP;
  const Weights keys{count, at.width, 8, CACHE_GROUP, true, (const uint8_t*)at.keys.data + place_of(at.keys, head, first),
                     scales_of(at, at.keys, head, first), nullptr, nullptr};
  const Rows activations{rows, queries.codes + from * at.width, queries.scales + from * groups, queries.sums + from * groups};
  multiply_as<8, CACHE_WORDS, true>(keys, activations, Then::nothing, scores, SLOTS, 0, (count + 2 * L - 1) / (2 * L));
}

// The weights [SLOTS] of a row times the scales of each group of values: [SLOTS, width / CACHE_GROUP].
template <int GROUPS>
inline void scale_weights(int64_t groups, const float* scales, const float* weights, float* out) {
  for (int64_t slot = 0; slot < SLOTS; slot++)
    for (int64_t g = 0; g < (GROUPS ? GROUPS : groups); g++, out++, scales++) *out = weights[slot] * *scales;
}

inline void scale_weights(int64_t groups, const float* scales, const float* weights, float* out) {
  if (groups == 4) scale_weights<4>(groups, scales, weights, out);  // heads of 128
  else scale_weights<0>(groups, scales, weights, out);
}

// Scales of a block's values as floats, [SLOTS, width / CACHE_GROUP]; zeros for slots that are not there.
inline void scales_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out) {
  const int64_t groups = at.width / CACHE_GROUP;
  const uint16_t* scales = scales_of(at, at.values, head, first);
  for (int64_t i = 0; i < SLOTS * groups; i += 16) {
    const int64_t left = count * groups - i;
    alignas(64) uint16_t part[16] = {};
    if (left < 16 && left > 0) memcpy(part, scales + i, left * 2);
    const uint16_t* from = left < 16 ? part : scales + i;
    for (int v = 0; v < 16; v += L) Isa::store_floats(out + i + v, Isa::load_halves(from + v));
  }
}

// ---- attention ----

// One block of scores [SLOTS] of a row becomes weights; returns their factor for what was summed before.
inline float soften(float* scores, int64_t count, float& most, float& total) {
  Floats each = Isa::set_float(-INFINITY);
  for (int64_t i = count; i < SLOTS; i++) scores[i] = -INFINITY;
  for (int i = 0; i < SLOTS; i += L) each = Isa::max(each, Isa::load_floats(scores + i));
  alignas(64) float lanes[16];
  Isa::store_floats(lanes, each);
  for (int half = L / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[half + i] ? lanes[i] : lanes[half + i];
  const float now = lanes[0] > most ? lanes[0] : most;  // a score that is NaN makes a weight that is
  for (int i = 0; i < SLOTS; i += L) {
    const Floats weight = exp_of(Isa::add_floats(Isa::load_floats(scores + i), Isa::set_float(-now)));
    Isa::store_floats(scores + i, weight);
  }
  for (int64_t i = count; i < SLOTS; i++) scores[i] = 0;
  Floats sum[16 / L];  // 16 lanes in every variant
  for (int v = 0; v < 16 / L; v++) sum[v] = Isa::set_float(0);
  for (int i = 0; i < SLOTS; i += 16)
    for (int v = 0; v < 16 / L; v++) sum[v] = Isa::add_floats(sum[v], Isa::load_floats(scores + i + v * L));
  Isa::store_floats(lanes, exp_of(Isa::set_float(most - now)));
  const float factor = most == -INFINITY ? 0 : lanes[0];
  for (int v = 0; v < 16 / L; v++) Isa::store_floats(lanes + v * L, sum[v]);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[half + i];
  total = total * factor + lanes[0];
  most = now;
  return factor;
}

template <Stored STORED>
void attend_as(const Attention& at, int64_t head, int64_t first, int64_t last) {
  const int64_t group = at.heads / at.kv_heads, count = (last - first) * group, width = at.width;
  thread_local std::vector<float> memory;
  const int64_t groups = STORED == Stored::int8 ? width / CACHE_GROUP : 0;
  const size_t needed = size_t(count) * (3 * width + SLOTS + 2 + groups * (SLOTS + 2)) + 2 * SLOTS * width + groups * SLOTS + 16;
  if (memory.size() < needed) memory.resize(needed);
  float* next = (float*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
  const auto take = [&](int64_t size) { return next += size, next - size; };
  float *keys = take(SLOTS * width), *values = take(SLOTS * width), *queries = take(count * width), *sums = take(count * width);
  float *scores = take(count * SLOTS), *most = take(count), *total = take(count), *scaled = take(count * groups * SLOTS);
  float* value_scales = take(groups * SLOTS);
  Queries rounded{(int8_t*)take(count * width / 4), take(count * groups), (int32_t*)take(count * groups)};
  for (int64_t i = 0; i < count; i++) {  // rows of a head one after the other, so that a block's rows are the last ones
    const int64_t row = first + i / group, query = head * group + i % group, slot = at.first_slot + row;
    const float* x = at.qkv + (row * (at.heads + 2 * at.kv_heads) + query) * width;
    if (at.cos) rotate(x, at.cos + slot * width / 2, at.sin + slot * width / 2, width, at.scale, queries + i * width);
    else
      for (int64_t j = 0; j < width; j++) queries[i * width + j] = x[j] * at.scale;
    if (STORED == Stored::int8)
      round_row(queries + i * width, width, CACHE_GROUP, 8, rounded.codes + i * width, rounded.scales + i * groups, rounded.sums + i * groups);
    most[i] = -INFINITY, total[i] = 0;
    memset(sums + i * width, 0, width * 4);
  }
  const int64_t slots = at.first_slot + (at.is_causal ? last : at.rows);
  for (int64_t start = 0; start < slots; start += SLOTS) {
    const int64_t here = slots - start < SLOTS ? slots - start : SLOTS;
    const int64_t columns = (here + L - 1) / L * L;
    // Rows whose own slot comes before this block see nothing of it.
    const int64_t from = at.is_causal && start > at.first_slot + first ? (start - at.first_slot - first) * group : 0;
    if (from >= count) continue;
    memset(scores + from * SLOTS, 0, (count - from) * SLOTS * 4);
    if constexpr (STORED == Stored::int8) {
      for (const Cache& cache : {at.keys, at.values})  // small and far apart: no processor fetches them by itself
        fetch(scales_of(at, cache, head, start + SLOTS), SLOTS * groups * 2);
      scales_of_block(at, head, start, here, value_scales);
      scores_of_int8(at, head, start, here, rounded, from, count - from, scores + from * SLOTS);
    } else if (count == 1) {
      scores_of_one<STORED>(at, head, start, here, queries, scores);
    } else {
      keys_of_block<STORED>(at, head, start, here, keys);
      multiply_floats(count - from, queries + from * width, width, 1, keys, SLOTS, scores + from * SLOTS, SLOTS, width, columns);
    }
    for (int64_t i = from; i < count; i++) {
      const int64_t seen = at.is_causal ? at.first_slot + first + i / group + 1 - start : here;
      const float factor = soften(scores + i * SLOTS, seen < SLOTS ? seen : SLOTS, most[i], total[i]);
      for (int64_t column = 0; column < width; column += L)
        Isa::store_floats(sums + i * width + column, Isa::mul(Isa::load_floats(sums + i * width + column), Isa::set_float(factor)));
      if (STORED == Stored::int8) scale_weights(groups, value_scales, scores + i * SLOTS, scaled + i * groups * SLOTS);
    }
    if (count == 1 && width % (8 * L) == 0) {
      values_of_one<STORED>(at, head, start, here, STORED == Stored::int8 ? scaled : scores, sums);
      continue;
    }
    int64_t stride;
    const float* block_values = values_of_block<STORED>(at, head, start, here, values, stride);
    if (STORED != Stored::int8)
      multiply_floats(count - from, scores + from * SLOTS, SLOTS, 1, block_values, stride, sums + from * width, width, here, width);
    for (int64_t g = 0; g < groups; g++)
      multiply_floats(count - from, scaled + from * groups * SLOTS + g, groups * SLOTS, groups, block_values + g * CACHE_GROUP, stride,
                      sums + from * width + g * CACHE_GROUP, width, here, CACHE_GROUP);
  }
  for (int64_t i = 0; i < count; i++) {
    float* y = at.y + (first + i / group) * at.heads * width + (head * group + i % group) * width;
    for (int64_t column = 0; column < width; column += L)
      Isa::store_floats(y + column, Isa::div(Isa::load_floats(sums + i * width + column), Isa::set_float(total[i])));
  }
}

// All heads that share key and value head `head`, for rows first to last (exclusive) of a call.
void attend(const Attention& at, int64_t head, int64_t first, int64_t last) {
  if (at.stored == Stored::fp32) attend_as<Stored::fp32>(at, head, first, last);
  if (at.stored == Stored::fp16) attend_as<Stored::fp16>(at, head, first, last);
  if (at.stored == Stored::int8) attend_as<Stored::int8>(at, head, first, last);
}

}  // namespace
