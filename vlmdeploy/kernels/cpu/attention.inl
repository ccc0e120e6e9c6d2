// Attention, written once over the vectors of an instruction set; included after product.inl.

namespace {

// C [ROWS, N] += A [ROWS, depth] * B [depth, N], each sum from the first to the last of `depth`.
template <int ROWS, int VECTORS>
inline void multiply_floats(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, int64_t n) {
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
        const Floats left = Isa::set_float(a[r * a_row + k]);
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
    if (column < n) multiply_floats<ROWS, VECTORS / 2>(a, a_row, b + column, b_row, c + column, c_row, depth, n - column);
}

inline void multiply_floats(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth,
                            int64_t n) {
  int64_t row = 0;
  for (; row + Isa::FLOAT_ROWS <= rows; row += Isa::FLOAT_ROWS)
    multiply_floats<Isa::FLOAT_ROWS, Isa::COLUMNS>(a + row * a_row, a_row, b, b_row, c + row * c_row, c_row, depth, n);
  for (; row < rows; row++) multiply_floats<1, 128 / L>(a + row * a_row, a_row, b, b_row, c + row * c_row, c_row, depth, n);
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
  return cache.scales + place_of(cache, head, slot) / at.width * ((at.width + CACHE_GROUP - 1) / CACHE_GROUP);
}

inline void store_row(const Attention& at, const Cache& cache, int64_t head, int64_t slot, const float* x) {
  const int64_t width = at.width, place = place_of(cache, head, slot);
  if (at.stored == Stored::fp32) {
    memcpy((float*)cache.data + place, x, width * 4);
  } else if (at.stored == Stored::fp16) {
    for (int64_t i = 0; i < width; i += L) Isa::store_halves((uint16_t*)cache.data + place + i, Isa::load_floats(x + i));
  } else {
    for (int64_t g = 0; g < width; g += CACHE_GROUP) {
      const int group = int(width - g < CACHE_GROUP ? width - g : CACHE_GROUP);
      const float most = Isa::largest(x + g, group);
      uint16_t scale = half_of(most / 127.0f);
      if (half_to_float(scale) * 127.0f < most) scale++;  // rounded up, so that no code is above 127
      const bool holds = most <= 127.0f * 65504.0f;       // fp16's largest
      scales_of(at, cache, head, slot)[g / CACHE_GROUP] = holds ? scale : 0x7e00;  // NaN
      Isa::round(x + g, group, holds && scale ? 1.0f / half_to_float(scale) : 0, (int8_t*)cache.data + place + g);
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

// The values of one slot.
template <Stored STORED>
struct Row {
  const void* data;
  const uint16_t* scales;

  Row() = default;
  Row(const Attention& at, const Cache& cache, int64_t head, int64_t slot) {
    const int64_t place = place_of(cache, head, slot);
    data = STORED == Stored::fp32   ? (const void*)((const float*)cache.data + place)
           : STORED == Stored::fp16 ? (const void*)((const uint16_t*)cache.data + place)
                                    : (const void*)((const int8_t*)cache.data + place);
    scales = STORED == Stored::int8 ? scales_of(at, cache, head, slot) : nullptr;
  }
  Floats load(int64_t column) const {
    if (STORED == Stored::fp32) return Isa::load_floats((const float*)data + column);
    if (STORED == Stored::fp16) return Isa::load_halves((const uint16_t*)data + column);
    const Floats codes = Isa::to_float(Isa::load_bytes((const int8_t*)data + column));
    return Isa::mul(codes, Isa::set_half(scales[column / CACHE_GROUP]));
  }
};

// Fetches `bytes` from `from` on into the cache.
inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)from + i);
}

template <Stored STORED>
struct Block {  // the slots of a block, and the next one's memory
  Row<STORED> rows[SLOTS];
  int64_t count;

  Block(const Attention& at, const Cache& cache, int64_t head, int64_t first, int64_t count) : count(count) {
    for (int64_t i = 0; i < count; i++) rows[i] = Row<STORED>(at, cache, head, first + i);
  }
  // Fetches a part of the next block, in the order of memory.
  void fetch_next(const Attention& at, const Cache& cache, int64_t part, int64_t parts) const {
    const int64_t bytes = at.width * (STORED == Stored::fp32 ? 4 : STORED == Stored::fp16 ? 2 : 1);
    const int64_t step = bytes / at.width * SLOTS * cache.slot_stride;
    for (int64_t i = SLOTS * part / parts; i < SLOTS * (part + 1) / parts && i < count; i++) fetch((const char*)rows[i].data + step, bytes);
  }
};

// take(p, group, values p of the L slots of that group; zeros beyond the last) for int8 keys. The 32-bit words of four codes of all
// slots are turned first and then taken apart for all groups side by side, so that no sum waits for itself.
template <int PLACE, typename Take>
inline void take_place(const Ints* words, const Floats* scales, int64_t p, const Take& take) {
#pragma GCC unroll 16
  for (int group = 0; group < SLOTS / L; group++) take(p, group, Isa::mul(Isa::to_float(Isa::byte<PLACE>(words[group])), scales[group]));
}

template <typename Take>
inline void take_int8_keys(const Attention& at, const Block<Stored::int8>& block, const Take& take) {
  constexpr int GROUPS = SLOTS / L;
  Floats scales[GROUPS];
  Ints words[L][GROUPS];
  for (Floats& scale : scales) scale = Isa::set_float(0);
  for (int64_t column = 0; column < at.width; column += 4 * L) {
    for (int group = 0; group < GROUPS; group++) {
      const Row<Stored::int8>* rows = block.rows + group * L;
      const int64_t held = block.count - group * L;
      Ints turned[L];
      for (int i = 0; i < L; i++) turned[i] = i < held ? Isa::load((const int32_t*)((const int8_t*)rows[i].data + column)) : Isa::set(0);
      if (held > 0) Isa::transpose(turned);
      for (int i = 0; i < L; i++) words[i][group] = turned[i];
      block.fetch_next(at, at.keys, column / (4 * L) * GROUPS + group, at.width / (4 * L) * GROUPS);
    }
    for (int word = 0; word < L; word++) {
      const int64_t p = column + 4 * word;
      if (p % CACHE_GROUP == 0) {
        alignas(64) uint16_t halves[SLOTS];
        for (int i = 0; i < SLOTS; i++) halves[i] = i < block.count ? block.rows[i].scales[p / CACHE_GROUP] : 0;
        for (int group = 0; group < GROUPS; group++) scales[group] = Isa::load_halves(halves + group * L);
      }
      take_place<0>(words[word], scales, p, take), take_place<1>(words[word], scales, p + 1, take);
      take_place<2>(words[word], scales, p + 2, take), take_place<3>(words[word], scales, p + 3, take);
    }
  }
}

// The same for any type of keys, one group: take(p, values p of the slots that are `held`, and zeros).
template <Stored STORED, typename Take>
inline __attribute__((always_inline)) void take_keys(const Attention& at, const Row<STORED>* rows, int64_t held, const Take& take) {
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
  const Block<STORED> block(at, at.keys, head, first, count);
  const auto put_keys = [&](int64_t p, int64_t group, Floats values) { Isa::store_floats(out + p * SLOTS + group * L, values); };
  if constexpr (STORED == Stored::int8)
    if (at.width % (4 * L) == 0) return take_int8_keys(at, block, put_keys);
  for (int64_t group = 0; group * L < count; group++) {
    take_keys(at, block.rows + group * L, count - group * L, [&](int64_t p, Floats values) { put_keys(p, group, values); });
    block.fetch_next(at, at.keys, group, SLOTS / L);
  }
}

// Scores of a single query, [SLOTS].
template <Stored STORED>
inline void scores_of_one(const Attention& at, int64_t head, int64_t first, int64_t count, const float* query, float* scores) {
  const Block<STORED> block(at, at.keys, head, first, count);
  if constexpr (STORED == Stored::int8)
    if (at.width % (4 * L) == 0) {
      Floats sums[SLOTS / L];
      for (Floats& sum : sums) sum = Isa::set_float(0);
      take_int8_keys(at, block, [&](int64_t p, int group, Floats values) {
        sums[group] = Isa::fma(Isa::set_float(query[p]), values, sums[group]);
      });
      for (int group = 0; group < SLOTS / L; group++) Isa::store_floats(scores + group * L, sums[group]);
      return;
    }
  for (int64_t group = 0; group * L < count; group++) {
    Floats sum = Isa::set_float(0);
    take_keys(at, block.rows + group * L, count - group * L,
              [&](int64_t p, Floats values) { sum = Isa::fma(Isa::set_float(query[p]), values, sum); });
    Isa::store_floats(scores + group * L, sum);
    block.fetch_next(at, at.keys, group, SLOTS / L);
  }
}

// Sums of a single row's weights times values, added to what is there. width: a multiple of 8 * L and of CACHE_GROUP.
template <Stored STORED>
inline void values_of_one(const Attention& at, int64_t head, int64_t first, int64_t count, const float* weights, float* sums) {
  const Block<STORED> block(at, at.values, head, first, count);
  for (int64_t column = 0; column < at.width; column += 8 * L) {
    Floats sum[8];
    for (int v = 0; v < 8; v++) sum[v] = Isa::load_floats(sums + column + v * L);
    for (int64_t slot = 0; slot < count; slot++) {
      const Floats weight = Isa::set_float(weights[slot]);
      const Row<STORED>& row = block.rows[slot];
      if constexpr (STORED == Stored::int8) {
#pragma GCC unroll 8
        for (int g = 0; g < 8 * L / CACHE_GROUP; g++) {
          const Floats scale = Isa::set_half(row.scales[column / CACHE_GROUP + g]);
          const int8_t* codes = (const int8_t*)row.data + column + g * CACHE_GROUP;
#pragma GCC unroll 8
          for (int i = 0; i < CACHE_GROUP / L; i++) {
            Floats& one = sum[g * (CACHE_GROUP / L) + i];
            one = Isa::fma(weight, Isa::mul(Isa::to_float(Isa::load_bytes(codes + i * L)), scale), one);
          }
        }
      } else {
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) sum[v] = Isa::fma(weight, row.load(column + v * L), sum[v]);
      }
    }
    for (int v = 0; v < 8; v++) Isa::store_floats(sums + column + v * L, sum[v]);
  }
}

// Values of a block as floats: where they are, or [SLOTS, width] at `out`; `stride` between slots.
template <Stored STORED>
inline const float* values_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out, int64_t& stride) {
  const float* start = out;
  stride = at.width;
  if (STORED == Stored::fp32) {
    stride = at.values.slot_stride;
    return (const float*)at.values.data + place_of(at.values, head, first);
  }
  for (int64_t slot = 0; slot < count; slot++, out += at.width) {
    const Row<STORED> row(at, at.values, head, first + slot);
    if (STORED == Stored::fp16) {
      for (int64_t column = 0; column < at.width; column += L) Isa::store_floats(out + column, row.load(column));
      continue;
    }
    for (int64_t group = 0; group < at.width; group += CACHE_GROUP) {
      const Floats scale = Isa::set_half(row.scales[group / CACHE_GROUP]);
      const int64_t end = group + CACHE_GROUP < at.width ? group + CACHE_GROUP : at.width;
      for (int64_t column = group; column < end; column += L)
        Isa::store_floats(out + column, Isa::mul(Isa::to_float(Isa::load_bytes((const int8_t*)row.data + column)), scale));
    }
  }
  return start;
}

// ---- attention ----

// One block of scores [SLOTS] of a row becomes weights; returns their factor for what was summed before.
inline float soften(float* scores, int64_t count, float& most, float& total) {
  Floats each = Isa::set_float(-INFINITY);
  for (int64_t i = count; i < SLOTS; i++) scores[i] = -INFINITY;
  for (int i = 0; i < SLOTS; i += L) each = Isa::max(each, Isa::load_floats(scores + i));
  alignas(64) float lanes[16];
  Isa::store_floats(lanes, each);
  float now = most;
  for (int i = 0; i < L; i++) {
    const float lane = lanes[i];
    now = lane > now || std::isnan(lane) ? lane : now;
  }
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
  float of_block = 0;
  for (float lane : lanes) of_block += lane;
  total = total * factor + of_block;
  most = now;
  return factor;
}

template <Stored STORED>
void attend_as(const Attention& at, int64_t head, int64_t first, int64_t last) {
  const int64_t group = at.heads / at.kv_heads, count = (last - first) * group, width = at.width;
  thread_local std::vector<float> memory;
  const size_t needed = size_t(count) * (2 * width + SLOTS + 2) + 2 * SLOTS * width + 16;
  if (memory.size() < needed) memory.resize(needed);
  float* next = (float*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
  const auto take = [&](int64_t size) { return next += size, next - size; };
  float *keys = take(SLOTS * width), *values = take(SLOTS * width), *queries = take(count * width), *sums = take(count * width);
  float *scores = take(count * SLOTS), *most = take(count), *total = take(count);
  for (int64_t i = 0; i < count; i++) {  // rows of a head one after the other, so that a block's rows are the last ones
    const int64_t row = first + i / group, query = head * group + i % group, slot = at.first_slot + row;
    const float* x = at.qkv + (row * (at.heads + 2 * at.kv_heads) + query) * width;
    if (at.cos) rotate(x, at.cos + slot * width / 2, at.sin + slot * width / 2, width, at.scale, queries + i * width);
    else
      for (int64_t j = 0; j < width; j++) queries[i * width + j] = x[j] * at.scale;
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
    if (count == 1) {
      scores_of_one<STORED>(at, head, start, here, queries, scores);
    } else {
      keys_of_block<STORED>(at, head, start, here, keys);
      multiply_floats(count - from, queries + from * width, width, keys, SLOTS, scores + from * SLOTS, SLOTS, width, columns);
    }
    for (int64_t i = from; i < count; i++) {
      const int64_t seen = at.is_causal ? at.first_slot + first + i / group + 1 - start : here;
      const float factor = soften(scores + i * SLOTS, seen < SLOTS ? seen : SLOTS, most[i], total[i]);
      for (int64_t column = 0; column < width; column += L)
        Isa::store_floats(sums + i * width + column, Isa::mul(Isa::load_floats(sums + i * width + column), Isa::set_float(factor)));
    }
    if (count == 1 && width % (8 * L) == 0) {
      values_of_one<STORED>(at, head, start, here, scores, sums);
    } else {
      int64_t value_stride;
      const float* block_values = values_of_block<STORED>(at, head, start, here, values, value_stride);
      multiply_floats(count - from, scores + from * SLOTS, SLOTS, block_values, value_stride, sums + from * width, width, here, width);
    }
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
