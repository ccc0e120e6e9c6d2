// AVX-512 with VNNI.
#if defined(__x86_64__)
#include <cfloat>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <vector>

#include "attention.h"
#include "instructions.h"
#include "product.h"

INSTRUCTIONS("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma")

namespace vlmdeploy::avx512 {
namespace {
struct Isa {
  static constexpr int L = 16, ROWS = 6, FLOAT_ROWS = 6, COLUMNS = 4;
  using Ints = __m512i;
  using Floats = __m512;

  static Ints set(int32_t value) { return _mm512_set1_epi32(value); }
  static Ints load(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store(int32_t* to, Ints value) { _mm512_storeu_si512(to, value); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints low(Ints bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
  static Ints high(Ints bytes) { return low(_mm512_srli_epi16(bytes, 4)); }
  static Ints whole(Ints bytes) { return bytes; }
  static Ints flip(Ints bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
  static constexpr int middle(int) { return 0; }
  static Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static Ints mul_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static Ints repeat(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    return set(word);
  }
  template <int BITS>
  static Ints dot(Ints sum, Ints codes, Ints activations) {
#if defined(__clang__)
    sum = _mm512_dpbusd_epi32(sum, codes, activations);
#else  // not the intrinsic: GCC 12 copies `sum` before and after it, at a third of the speed
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(activations));
#endif
    return sum;
  }

  static Ints add_up(const Ints v[4]) {
    const Ints a = add(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    const Ints b = add(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    return add(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  static void turn(Ints v[4]) {
    const Ints a = _mm512_shuffle_i32x4(v[0], v[1], 0x88), b = _mm512_shuffle_i32x4(v[0], v[1], 0xdd);
    const Ints c = _mm512_shuffle_i32x4(v[2], v[3], 0x88), d = _mm512_shuffle_i32x4(v[2], v[3], 0xdd);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88), v[1] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[2] = _mm512_shuffle_i32x4(a, c, 0xdd), v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }

  static Floats set_float(float value) { return _mm512_set1_ps(value); }
  static Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
  static Floats load_halves(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
  static void store_halves(uint16_t* to, Floats value) { _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, 0)); }
  static Ints load_bytes(const int8_t* from) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)); }
  static void store_floats(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static Floats as_floats(Ints value) { return _mm512_castsi512_ps(value); }
  static Ints as_ints(Floats value) { return _mm512_castps_si512(value); }
  static Floats to_float(Ints value) { return _mm512_cvtepi32_ps(value); }
  static Floats add_floats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats absolute(Floats a) { return _mm512_abs_ps(a); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where one is NaN
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats round_even(Floats value) { return _mm512_roundscale_ps(value, 0); }
  static Floats power_of_two(Floats n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), set(127)), 23));
  }

  static float largest(const float* x, int group) {
    Ints most = set(0);
    for (int i = 0; i < group; i += 16)
      most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_loadu_si512(x + i), set(0x7fffffff)));
    const int32_t bits = _mm512_reduce_max_epi32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  static int32_t round(const float* x, int group, float inverse, int8_t* codes) {
    Ints sum = set(0);
    for (int i = 0; i < group; i += 16) {
      const Ints rounded = _mm512_cvtps_epi32(mul(load_floats(x + i), set_float(inverse)));
      sum = add(sum, rounded);
      _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtsepi32_epi8(rounded));
    }
    return _mm512_reduce_add_epi32(sum);
  }

  static void transpose(Ints v[16]) {
    Ints t[16];
    for (int i = 0; i < 16; i += 4) {
      const Ints a = _mm512_unpacklo_epi32(v[i], v[i + 1]), b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
      const Ints c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
      t[i] = _mm512_unpacklo_epi64(a, c), t[i + 1] = _mm512_unpackhi_epi64(a, c);
      t[i + 2] = _mm512_unpacklo_epi64(b, d), t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
      const Ints a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
      const Ints c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
      v[i] = _mm512_shuffle_i32x4(a, c, 0x88), v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
      v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
  }
};
}  // namespace

#include "product.inl"
#include "attention.inl"

bool runs_here() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
extern const Variant variant = {"avx512-vnni", runs_here, 2 * Isa::L, round_row, multiply, write_cache, attend};
}  // namespace vlmdeploy::avx512
END_INSTRUCTIONS
#endif
