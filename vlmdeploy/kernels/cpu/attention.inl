// Attention, written once over the vectors of an instruction set; included after product.inl.

namespace {

// C [ROWS, N] += A [ROWS, depth] * B [depth, N], each sum from the first to the last of `depth`.
template <int ROWS, int VECTORS>
inline void multiply_floats(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t depth, int64_t n) {
  int64_t column = 0;
  for (; column + VECTORS * L <= n; column += VECTORS * L) {
    Floats sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] = Isa::load_floats(c + r * c_row + column + v * L);
    for (int64_t k = 0; k < depth; k++) {
      Floats right[VECTORS];
      for (int v = 0; v < VECTORS; v++) right[v] = Isa::load_floats(b + k * b_row + column + v * L);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const Floats left = Isa::set_float(a[r * a_row + k]);
        for (int v = 0; v < VECTORS; v++) sum[r][v] = Isa::fma(left, right[v], sum[r][v]);
      }
    }
    for (int r = 0; r < ROWS; r++)
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

// Keys of a block, [width, SLOTS]; the first `count` slots, then zeros up to a multiple of L. Fetches the next block.
template <Stored STORED>
inline void keys_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out) {
  const int64_t bytes = at.width * (STORED == Stored::fp32 ? 4 : STORED == Stored::fp16 ? 2 : 1);
  for (int64_t slot = 0; slot < count; slot += L) {
    const int64_t held = count - slot < L ? count - slot : L;
    Row<STORED> rows[L];
    for (int64_t i = 0; i < held; i++) rows[i] = Row<STORED>(at, at.keys, head, first + slot + i);
    for (int64_t column = 0; column < at.width; column += L) {
      Ints block[L];
      if (held == L) {
        for (int i = 0; i < L; i++) block[i] = Isa::as_ints(rows[i].load(column));
        // In the order of memory: row after row, while this block is read column by column.
        for (int64_t i = column * L / at.width; i < (column + L) * L / at.width; i++)
          fetch(Row<STORED>(at, at.keys, head, first + SLOTS + slot + i).data, bytes);
      } else {
        for (int i = 0; i < L; i++) block[i] = i < held ? Isa::as_ints(rows[i].load(column)) : Isa::set(0);
      }
      Isa::transpose(block);
      for (int i = 0; i < L; i++) Isa::store((int32_t*)out + (column + i) * SLOTS + slot, block[i]);
    }
  }
}

// Values of a block as floats: where they are, or [SLOTS, width] at `out`; `stride` between slots.
template <Stored STORED>
inline const float* values_of_block(const Attention& at, int64_t head, int64_t first, int64_t count, float* out, int64_t& stride) {
  stride = at.width;
  if (STORED == Stored::fp32) {
    stride = at.values.slot_stride;
    return (const float*)at.values.data + place_of(at.values, head, first);
  }
  for (int64_t slot = 0; slot < count; slot++) {
    const Row<STORED> row(at, at.values, head, first + slot);
    for (int64_t column = 0; column < at.width; column += L) Isa::store_floats(out + slot * at.width + column, row.load(column));
  }
  return out;
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
    keys_of_block<STORED>(at, head, start, here, keys);
    int64_t value_stride;
    const float* block_values = values_of_block<STORED>(at, head, start, here, values, value_stride);
    // Rows whose own slot comes before this block see nothing of it.
    const int64_t from = at.is_causal && start > at.first_slot + first ? (start - at.first_slot - first) * group : 0;
    if (from >= count) continue;
    memset(scores + from * SLOTS, 0, (count - from) * SLOTS * 4);
    multiply_floats(count - from, queries + from * width, width, keys, SLOTS, scores + from * SLOTS, SLOTS, width, columns);
    for (int64_t i = from; i < count; i++) {
      const int64_t seen = at.is_causal ? at.first_slot + first + i / group + 1 - start : here;
      const float factor = soften(scores + i * SLOTS, seen < SLOTS ? seen : SLOTS, most[i], total[i]);
      for (int64_t column = 0; column < width; column += L)
        Isa::store_floats(sums + i * width + column, Isa::mul(Isa::load_floats(sums + i * width + column), Isa::set_float(factor)));
    }
    multiply_floats(count - from, scores + from * SLOTS, SLOTS, block_values, value_stride, sums + from * width, width, here, width);
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
