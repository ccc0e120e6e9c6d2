// Plain C++: every machine, and what the tests compare the others with.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "product.h"

namespace vlmdeploy::plain {
namespace {
template <typename Number>
struct Four {
  Number v[4];
};
template <typename Number, typename Operation>
Four<Number> each(Operation operation) {
  Four<Number> out;
  for (int i = 0; i < 4; i++) out.v[i] = operation(i);
  return out;
}

struct Isa {
  static constexpr int L = 4, ROWS = 4, FLOAT_ROWS = 4, COLUMNS = 2;
  using Ints = Four<int32_t>;
  using Floats = Four<float>;

  static Ints set(int32_t value) { return each<int32_t>([&](int) { return value; }); }
  static Ints load(const int32_t* from) {
    Ints out;
    memcpy(&out, from, sizeof out);
    return out;
  }
  static void store(int32_t* to, Ints value) { memcpy(to, &value, sizeof value); }
  static Ints add(Ints a, Ints b) { return each<int32_t>([&](int i) { return a.v[i] + b.v[i]; }); }
  static Ints subtract(Ints a, Ints b) { return each<int32_t>([&](int i) { return a.v[i] - b.v[i]; }); }
  static Ints mul_ints(Ints a, Ints b) { return each<int32_t>([&](int i) { return a.v[i] * b.v[i]; }); }
  static Ints low(Ints bytes) { return each<int32_t>([&](int i) { return bytes.v[i] & 0x0f0f0f0f; }); }
  static Ints high(Ints bytes) { return each<int32_t>([&](int i) { return bytes.v[i] >> 4 & 0x0f0f0f0f; }); }
  static Ints whole(Ints bytes) { return bytes; }
  static Ints flip(Ints bytes) { return each<int32_t>([&](int i) { return bytes.v[i] ^ int32_t(0x80808080); }); }
  static constexpr int middle(int) { return 0; }
  static Ints repeat(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    return set(word);
  }
  template <int BITS>
  static Ints dot(Ints sum, Ints codes, Ints activations) {
    return each<int32_t>([&](int i) {
      uint8_t w[4];
      int8_t x[4];
      memcpy(w, &codes.v[i], 4), memcpy(x, &activations.v[i], 4);
      return sum.v[i] + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3];
    });
  }
  static Ints add_up(const Ints v[4]) {
    return each<int32_t>([&](int i) { return v[i].v[0] + v[i].v[1] + v[i].v[2] + v[i].v[3]; });
  }
  static void turn(Ints*) {}

  static Floats set_float(float value) { return each<float>([&](int) { return value; }); }
  static Floats load_floats(const float* from) {
    Floats out;
    memcpy(&out, from, sizeof out);
    return out;
  }
  static Floats load_halves(const uint16_t* from);
  static void store_halves(uint16_t* to, Floats value);
  static Ints load_bytes(const int8_t* from) { return each<int32_t>([&](int i) { return int32_t(from[i]); }); }
  static void store_floats(float* to, Floats value) { memcpy(to, &value, sizeof value); }
  static Floats as_floats(Ints value) {
    Floats out;
    memcpy(&out, &value, sizeof out);
    return out;
  }
  static Ints as_ints(Floats value) {
    Ints out;
    memcpy(&out, &value, sizeof out);
    return out;
  }
  static Floats to_float(Ints value) { return each<float>([&](int i) { return float(value.v[i]); }); }
  static Floats add_floats(Floats a, Floats b) { return each<float>([&](int i) { return a.v[i] + b.v[i]; }); }
  static Floats mul(Floats a, Floats b) { return each<float>([&](int i) { return a.v[i] * b.v[i]; }); }
  static Floats div(Floats a, Floats b) { return each<float>([&](int i) { return a.v[i] / b.v[i]; }); }
  static Floats fma(Floats a, Floats b, Floats c) { return each<float>([&](int i) { return std::fmaf(a.v[i], b.v[i], c.v[i]); }); }
  static Floats absolute(Floats a) { return each<float>([&](int i) { return std::fabs(a.v[i]); }); }
  static Floats min(Floats a, Floats b) { return each<float>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats max(Floats a, Floats b) { return each<float>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static Floats round_even(Floats value) { return each<float>([&](int i) { return std::nearbyintf(value.v[i]); }); }
  static Floats power_of_two(Floats n) {
    return each<float>([&](int i) { return std::isnan(n.v[i]) ? n.v[i] : std::ldexp(1.0f, int(n.v[i])); });
  }

  static float largest(const float* x, int group) {
    uint32_t most = 0;
    for (int i = 0; i < group; i++) {
      uint32_t bits;
      memcpy(&bits, x + i, 4);
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value;
  }

  static int32_t round(const float* x, int group, float inverse, int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < group; i++) {
      codes[i] = int8_t(std::nearbyintf(x[i] * inverse));
      sum += codes[i];
    }
    return sum;
  }

  static void transpose(Ints v[4]) {
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < i; j++) {
        const int32_t kept = v[i].v[j];
        v[i].v[j] = v[j].v[i], v[j].v[i] = kept;
      }
  }
};
}  // namespace

#include "product.inl"

namespace {
uint16_t float_to_half(float value) {  // rounds to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (bits < 0x38800000) {                       // below the smallest normal, 2^-14: in steps of 2^-24
    float small;
    memcpy(&small, &bits, 4);
    return sign | uint16_t(std::nearbyintf(small * 16777216.0f));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

Floats Isa::load_halves(const uint16_t* from) { return each<float>([&](int i) { return half_to_float(from[i]); }); }
void Isa::store_halves(uint16_t* to, Floats value) {
  for (int i = 0; i < 4; i++) to[i] = float_to_half(value.v[i]);
}
}  // namespace

#include "attention.inl"


bool runs_here() { return true; }
extern const Variant variant = {"plain", runs_here, 2 * Isa::L, round_row, multiply, write_cache, attend};
}  // namespace vlmdeploy::plain
