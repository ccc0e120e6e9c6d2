// The kernel, written once over the vectors of an instruction set; each variant includes it with its own `Isa`.
//
// Isa has: L lanes of 32 bits; Ints and Floats (vectors of L); the operations that are used below.

namespace {

constexpr int L = Isa::L;
using Ints = Isa::Ints;
using Floats = Isa::Floats;

// ---- activations ----

// Of 4-bit weights, the eight codes of a 32-bit word are multiplied as four even and four odd ones.
constexpr int places[8] = {0, 2, 4, 6, 1, 3, 5, 7};

void round_row(const float* x, int64_t width, int group, int bits, int8_t* codes, float* scales, int32_t* sums) {
  for (int64_t start = 0; start < width; start += group, x += group, codes += group) {
    const float largest = Isa::largest(x, group);
    const bool finite = largest <= FLT_MAX;
    const float inverse = finite && largest > 0 ? 127.0f / largest : 0.0f;
    *scales++ = finite ? largest / 127.0f : NAN;
    alignas(64) int8_t rounded[128];
    *sums++ = finite ? Isa::round(x, group, inverse, rounded) : 0;
    if (!finite) memset(rounded, 0, sizeof rounded);
    if (bits == 8) {
      memcpy(codes, rounded, group);
    } else {
      for (int word = 0; word < group; word += 8)
        for (int i = 0; i < 8; i++) codes[word + i] = rounded[word + places[i]];
    }
  }
}

// ---- weights ----

struct Tile {
  const uint8_t* rows[L];  // the codes of its outputs; beyond the last output, those of the last
  float* scales;           // [groups, L]
  int32_t* zeros;          // [groups, L], or null
  float bias[L];           // zeros without one
};

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
  uint32_t bits;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    const float value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// L scales from `place` on, as float32; zeros behind the last of `all`.
inline Ints load_scales(const Weights& w, int64_t place, int64_t all) {
  const uint8_t* from = (const uint8_t*)w.scales + place * (w.half_scales ? 2 : 4);
  alignas(64) uint8_t part[L * 4] = {};
  if (place + L > all) memcpy(part, from, (all - place) * (w.half_scales ? 2 : 4)), from = part;
  return w.half_scales ? Isa::as_ints(Isa::load_halves((const uint16_t*)from)) : Isa::load((const int32_t*)from);
}

// Opens the tile of these outputs and fetches scales of the one that begins `step` outputs later.
inline void open_tile(const Weights& w, const int64_t* outputs, int64_t step, Tile& tile, float* scales, int32_t* zeros) {
  const int64_t groups = w.width / w.group, row_bytes = w.width * w.bits / 8, scale_bytes = groups * (w.half_scales ? 2 : 4);
  for (int64_t i = 0; i < L * scale_bytes; i += 64) __builtin_prefetch((const char*)w.scales + (outputs[0] + step) * scale_bytes + i);
  for (int i = 0; i < L; i++) tile.rows[i] = w.codes + outputs[i] * row_bytes, tile.bias[i] = w.bias ? w.bias[outputs[i]] : 0;
  tile.scales = scales;
  const int64_t all = w.outputs * groups;
  for (int64_t g = 0; g < groups; g += L) {
    Ints block[L];
    for (int i = 0; i < L; i++) block[i] = load_scales(w, outputs[i] * groups + g, all);
    Isa::transpose(block);
    for (int i = 0; i < L; i++) Isa::store((int32_t*)scales + (g + i) * L, block[i]);
  }
  tile.zeros = w.zeros ? zeros : nullptr;
  if (!w.zeros) return;
  const int64_t zero_bytes = (groups * w.bits + 7) / 8;
  for (int i = 0; i < L; i++) {
    const uint8_t* row = w.zeros + outputs[i] * zero_bytes;
    for (int64_t g = 0; g < groups; g++) zeros[g * L + i] = w.bits == 8 ? row[g] : row[g / 2] >> 4 * (g % 2) & 15;
  }
}

// L words from `from` on, of which `left` are there; zeros for the others.
inline Ints load_words(const int32_t* from, int64_t left) {
  if (left >= L) return Isa::load(from);
  alignas(64) int32_t part[L] = {};
  memcpy(part, from, left * 4);
  return Isa::load(part);
}

// Eight-bit codes as Isa::dot takes them.
template <bool SIGNED>
inline Ints bytes_of(Ints codes) {
  return Isa::whole(SIGNED ? Isa::flip(codes) : codes);
}

// Words `word` to word + L of the codes of all outputs, as L vectors of one word of each output.
inline void read_words(const Tile& tile, int64_t word, int64_t words, Ints out[L]) {
  for (int i = 0; i < L; i++) out[i] = load_words((const int32_t*)tile.rows[i] + word, words - word);
  Isa::transpose(out);
}

// ---- products ----

// What the zero points take off: Isa::low, high and bytes_of give codes less `Isa::middle(bits)`; of signed ones, plus 128.
inline Ints start(const Tile& tile, int64_t g, int32_t sum, int bits) {
  if (!tile.zeros) return Isa::set(sum * (Isa::middle(bits) - (1 << (bits - 1))));
  return Isa::mul_ints(Isa::subtract(Isa::set(Isa::middle(bits)), Isa::load(tile.zeros + g * L)), Isa::set(sum));
}

inline Floats add_group(Floats total, Ints sum, const Tile& tile, int64_t g, float row_scale) {
  const Floats scale = Isa::mul(Isa::load_floats(tile.scales + g * L), Isa::set_float(row_scale));
  return Isa::fma(Isa::to_float(sum), scale, total);
}

// One row of activations, codes straight from the file, four outputs at a time from their first code to the last: memory
// is read in order. A vector of codes holds L / 4 chunks of 16 bytes; the sums of four outputs are added up within each
// chunk, and `turn` makes one vector of all outputs of each chunk.
// WORDS: words of 32 bits of a group. a: the activations as vectors, even ones before odd ones if codes have 4 bits.
// partial: memory for [width * BITS / (32 * max(WORDS, L)), L / 4] vectors.
template <int BITS, int WORDS, bool SIGNED>
inline Floats one_row(const Tile& tile, int64_t width, const int8_t* a, const float* scales, const int32_t* sums, int32_t* partial) {
  constexpr int CHUNKS = L / 4, STEPS = WORDS > L ? WORDS / L : 1, GROUPS = WORDS < L ? L / WORDS : 1;
  const int64_t words = width * BITS / 32, groups = width / (WORDS * 32 / BITS);
  for (int quarter = 0; quarter < CHUNKS; quarter++) {
    const int32_t* rows[4];
    for (int i = 0; i < 4; i++) rows[i] = (const int32_t*)tile.rows[quarter * 4 + i];
    int32_t* out = partial + quarter * L;
    for (int64_t word = 0; word < words; word += STEPS * L, out += CHUNKS * L) {
      Ints sum[4];
      for (int i = 0; i < 4; i++) sum[i] = Isa::set(0);
      for (int step = 0; step < STEPS; step++) {
        const int64_t at = word + step * L;
        const int32_t* x = (const int32_t*)a + at * (BITS == 4 ? 2 : 1);
        for (int i = 0; i < 4; i++) {
          __builtin_prefetch(rows[0] + 2048 + at * 4 + i * L);  // 8 KB ahead, in the order of memory
          const Ints codes = load_words(rows[i] + at, words - at);
          if (BITS == 4) {
            sum[i] = Isa::dot<4>(sum[i], Isa::low(codes), Isa::load(x));
            sum[i] = Isa::dot<4>(sum[i], Isa::high(codes), Isa::load(x + L));
          } else {
            sum[i] = Isa::dot<8>(sum[i], bytes_of<SIGNED>(codes), Isa::load(x));
          }
        }
      }
      Isa::store(out, Isa::add_up(sum));
    }
  }
  Floats total = Isa::set_float(0);
  for (int64_t g = 0; g < groups; partial += CHUNKS * L) {
    Ints chunks[CHUNKS];
    for (int i = 0; i < CHUNKS; i++) chunks[i] = Isa::load(partial + i * L);
    Isa::turn(chunks);
    for (int group = 0; group < GROUPS && g < groups; group++, g++) {
      Ints sum = start(tile, g, sums[g], BITS);
      for (int i = 0; i < CHUNKS / GROUPS; i++) sum = Isa::add(sum, chunks[group * (CHUNKS / GROUPS) + i]);
      total = add_group(total, sum, tile, g, scales[g]);
    }
  }
  return total;
}

// Activations of one row as `one_row` reads them; zeros after the last.
template <int BITS>
inline void as_vectors(const int8_t* codes, int64_t width, int8_t* out) {
  const int64_t step = L * 32 / BITS;
  for (int64_t start = 0; start < width; start += step, out += step) {
    const int64_t bytes = width - start < step ? width - start : step;
    memset(out, 0, step);
    if (BITS == 8) memcpy(out, codes + start, bytes);
    else
      for (int64_t word = 0; word < bytes / 8; word++)
        memcpy(out + word * 4, codes + start + word * 8, 4), memcpy(out + L * 4 + word * 4, codes + start + word * 8 + 4, 4);
  }
}

// Two tiles as bytes, what a block of rows reads again and again, and that block's sums.
#ifndef PAIRED

template <int BITS, bool SIGNED>
inline void unpack(const Tile* tiles, int64_t width, uint8_t* out) {  // [width / 4, 2, L, 4]
  const int64_t words = width * BITS / 32;
  for (int t = 0; t < 2; t++)
    for (int64_t word = 0; word < words; word += L) {
      Ints block[L];
      read_words(tiles[t], word, words, block);
      for (int i = 0; i < L && word + i < words; i++) {
        if (BITS == 4) {
          Isa::store((int32_t*)(out + ((word + i) * 4 + t) * L * 4), Isa::low(block[i]));
          Isa::store((int32_t*)(out + ((word + i) * 4 + 2 + t) * L * 4), Isa::high(block[i]));
        } else {
          Isa::store((int32_t*)(out + ((word + i) * 2 + t) * L * 4), bytes_of<SIGNED>(block[i]));
        }
      }
    }
}

// Sums of one group; a: its first activation in the first row; codes moves to the next group.
template <int BITS, int ROWS>
inline void group_sums(const uint8_t*& codes, int64_t width, int group, const int8_t* a, Ints sum[ROWS][2]) {
  for (int step = 0; step < group / 4; step++, a += 4, codes += 2 * L * 4) {
    const Ints first = Isa::load((const int32_t*)codes), second = Isa::load((const int32_t*)codes + L);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const Ints x = Isa::repeat(a + r * width);
      sum[r][0] = Isa::dot<BITS>(sum[r][0], first, x);
      sum[r][1] = Isa::dot<BITS>(sum[r][1], second, x);
    }
  }
}

#else

template <int BITS, bool SIGNED>
inline void unpack(const Tile* tiles, int64_t width, uint8_t* out) {  // [width / 8, 2, L, 8]
  const int64_t words = width * BITS / 32;
  for (int t = 0; t < 2; t++)
    for (int64_t word = 0; word < words; word += L) {
      Ints block[L];
      read_words(tiles[t], word, words, block);
      for (int i = 0; i < L && word + i < words; i += BITS / 4) {
        const Ints a = BITS == 4 ? Isa::low(block[i]) : bytes_of<SIGNED>(block[i]);
        const Ints b = BITS == 4 ? Isa::high(block[i]) : bytes_of<SIGNED>(block[i + 1]);
        int32_t* to = (int32_t*)(out + ((word + i) / (BITS / 4) * 2 + t) * L * 8);
        Isa::store(to, Isa::first_words(a, b)), Isa::store(to + L, Isa::second_words(a, b));
      }
    }
}

template <int BITS, int ROWS>
inline void group_sums(const uint8_t*& codes, int64_t width, int group, const int8_t* a, Ints sum[ROWS][2]) {
  constexpr int PAIRS = (ROWS + 1) / 2;
  Ints part[PAIRS][4];
  for (auto& pair : part)
    for (Ints& one : pair) one = Isa::set(0);
  for (int step = 0; step < group / 8; step++, a += 8, codes += 2 * L * 8) {
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; p++) {
      const Ints x = Isa::two_rows(a + 2 * p * width, a + (2 * p + 1 < ROWS ? 2 * p + 1 : 2 * p) * width);
      for (int i = 0; i < 4; i++) part[p][i] = Isa::dot_pairs(part[p][i], x, Isa::load((const int32_t*)codes + i * L));
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < 2; t++) {
      const Ints *two = part[r / 2] + 2 * t, a = two[0], b = two[1];
      sum[r][t] = Isa::add(sum[r][t], r % 2 ? Isa::upper_halves(a, b) : Isa::lower_halves(a, b));
    }
}

#endif

template <int BITS, int ROWS>
inline void some_rows(const Tile* tiles, const uint8_t* codes, int64_t width, int group, const int8_t* a,
                      const float* scales, const int32_t* sums, Floats out[][2]) {
  const int64_t groups = width / group;
  for (int r = 0; r < ROWS; r++) out[r][0] = out[r][1] = Isa::set_float(0);
  for (int64_t g = 0; g < groups; g++) {
    Ints sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < 2; t++) sum[r][t] = start(tiles[t], g, sums[r * groups + g], BITS);
    group_sums<BITS, ROWS>(codes, width, group, a + g * group, sum);
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < 2; t++) out[r][t] = add_group(out[r][t], sum[r][t], tiles[t], g, scales[r * groups + g]);
  }
}

// ---- what follows the product ----

inline Floats exp_of(Floats x) {
  x = Isa::min(Isa::set_float(88.0f), Isa::max(Isa::set_float(-87.0f), x));
  const Floats n = Isa::round_even(Isa::mul(x, Isa::set_float(1.44269504f)));
  Floats r = Isa::fma(n, Isa::set_float(-0.693145752f), x);
  r = Isa::fma(n, Isa::set_float(-1.42860677e-6f), r);
  Floats p = Isa::set_float(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = Isa::fma(p, r, Isa::set_float(c));
  return Isa::mul(p, Isa::power_of_two(n));
}

inline Floats silu_times(Floats gate, Floats up) {
  const Floats one = Isa::set_float(1), negated = Isa::mul(gate, Isa::set_float(-1));
  return Isa::mul(Isa::div(gate, Isa::add_floats(one, exp_of(negated))), up);
}

// x / 2 * (1 + erf(x / sqrt 2)); erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats z = Isa::mul(Isa::absolute(x), Isa::set_float(0.70710678f));
  const Floats t = Isa::div(Isa::set_float(1), Isa::fma(Isa::set_float(0.3275911f), z, Isa::set_float(1)));
  Floats p = Isa::set_float(1.061405429f);
  for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = Isa::fma(p, t, Isa::set_float(c));
  const Floats rest = Isa::mul(Isa::mul(p, t), exp_of(Isa::mul(Isa::mul(z, z), Isa::set_float(-1))));  // 1 - erf(z)
  // Of x below zero: x / 2 * rest; of the others: x - x / 2 * rest.
  const Floats half = Isa::mul(Isa::mul(x, Isa::set_float(0.5f)), rest), positive = Isa::max(Isa::set_float(0), x);
  return Isa::add_floats(positive, Isa::mul(Isa::absolute(half), Isa::set_float(-1)));
}

inline void put(float* y, Floats value, int64_t left) {
  if (left >= L) {
    Isa::store_floats(y, value);
  } else if (left > 0) {
    alignas(64) float part[L];
    Isa::store_floats(part, value);
    memcpy(y, part, left * 4);
  }
}

// ---- all rows, some tiles ----

struct Place {
  float* y;
  int64_t stride, row_width, first;  // between rows of y; outputs of a row; the first output of the tile
  Then then;
};

inline void finish(const Weights& w, const Tile* tiles, const Place& place, int64_t row, Floats a, Floats b) {
  if (w.bias) a = Isa::add_floats(a, Isa::load_floats(tiles[0].bias)), b = Isa::add_floats(b, Isa::load_floats(tiles[1].bias));
  float* y = place.y + row * place.stride + place.first;
  const int64_t left = place.row_width - place.first;
  if (place.then == Then::swiglu) {
    put(y, silu_times(a, b), left);
  } else {
    if (place.then == Then::gelu) a = gelu(a), b = gelu(b);
    put(y, a, left), put(y + L, b, left - L);
  }
}

// ROWS rows from `row` on; returns their number.
template <int BITS, int ROWS>
int64_t block(const Weights& w, const Rows& rows, const Tile* tiles, const uint8_t* codes, const Place& place, int64_t row) {
  const int64_t groups = w.width / w.group;
  Floats out[ROWS][2];
  some_rows<BITS, ROWS>(tiles, codes, w.width, w.group, rows.codes + row * w.width, rows.scales + row * groups,
                        rows.sums + row * groups, out);
  for (int r = 0; r < ROWS; r++) finish(w, tiles, place, row + r, out[r][0], out[r][1]);
  return ROWS;
}

template <int BITS, int WORDS, bool SIGNED>
void multiply_as(const Weights& w, const Rows& rows, Then then, float* y, int64_t y_stride, int64_t first_tile, int64_t last_tile) {
  const int64_t groups = w.width / w.group, row_width = then == Then::swiglu ? w.outputs / 2 : w.outputs;
  const size_t table = size_t(groups + L) * L * 4;
  // Scales and zero points of two tiles; then the codes of two tiles, or the activations of the only row and its partial sums.
  const size_t vectors = (size_t(w.width) + L * 8 + 63) / 64 * 64, partials = (size_t(w.width) * BITS / 32 + L) * L;
  const size_t needed = 4 * table + (rows.count > 1 ? size_t(w.width) * 2 * L : vectors + partials) + 64;
  thread_local std::vector<uint8_t> memory;
  if (memory.size() < needed) memory.resize(needed);
  uint8_t* base = (uint8_t*)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
  uint8_t* codes = base + 4 * table;
  int32_t* partial = (int32_t*)(codes + vectors);
  if (rows.count == 1) as_vectors<BITS>(rows.codes, w.width, (int8_t*)codes);
  for (int64_t t = first_tile; t < last_tile; t++) {
    const int64_t step = then == Then::swiglu ? L : 2 * L;
    const Place place{y, y_stride, row_width, t * step, then};
    Tile tiles[2];
    for (int half = 0; half < 2; half++) {
      int64_t outputs[L];
      for (int i = 0; i < L; i++) {
        const int64_t own = place.first + i + (then == Then::swiglu ? 0 : half * L);
        outputs[i] = (own < row_width ? own : row_width - 1) + (then == Then::swiglu ? half * row_width : 0);
      }
      open_tile(w, outputs, step, tiles[half], (float*)(base + half * table), (int32_t*)(base + (2 + half) * table));
    }
    if (rows.count == 1) {
      Floats out[2];
      for (int i = 0; i < 2; i++)
        out[i] = one_row<BITS, WORDS, SIGNED>(tiles[i], w.width, (int8_t*)codes, rows.scales, rows.sums, partial);
      finish(w, tiles, place, 0, out[0], out[1]);
      continue;
    }
    unpack<BITS, SIGNED>(tiles, w.width, codes);
    for (int64_t row = 0; row < rows.count;) {
      const int64_t left = rows.count - row;
      if (left >= Isa::ROWS) row += block<BITS, Isa::ROWS>(w, rows, tiles, codes, place, row);
      else if (left >= 2) row += block<BITS, 2>(w, rows, tiles, codes, place, row);
      else row += block<BITS, 1>(w, rows, tiles, codes, place, row);
    }
  }
}

void multiply(const Weights& w, const Rows& rows, Then then, float* y, int64_t first_tile, int64_t last_tile) {
  const int words = w.group * w.bits / 32;
  const int64_t stride = then == Then::swiglu ? w.outputs / 2 : w.outputs;
  if (w.bits == 4) {
    if (words == 4) multiply_as<4, 4, false>(w, rows, then, y, stride, first_tile, last_tile);
    if (words == 8) multiply_as<4, 8, false>(w, rows, then, y, stride, first_tile, last_tile);
    if (words == 16) multiply_as<4, 16, false>(w, rows, then, y, stride, first_tile, last_tile);
  } else {
    if (words == 8) multiply_as<8, 8, false>(w, rows, then, y, stride, first_tile, last_tile);
    if (words == 16) multiply_as<8, 16, false>(w, rows, then, y, stride, first_tile, last_tile);
    if (words == 32) multiply_as<8, 32, false>(w, rows, then, y, stride, first_tile, last_tile);
  }
}

}  // namespace
