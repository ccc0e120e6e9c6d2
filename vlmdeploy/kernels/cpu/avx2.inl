// 256-bit vectors of x86; DOT_VNNI: with the instruction that multiplies and adds four bytes at once.
#include <cfloat>
#include <cmath>
#include <cpuid.h>
#include <cstring>
#include <immintrin.h>
#include <vector>

#include "attention.h"
#include "instructions.h"
#include "product.h"

#ifdef DOT_VNNI
INSTRUCTIONS("avx2,f16c,fma,avxvnni")
#else
INSTRUCTIONS("avx2,f16c,fma")
#endif

namespace vlmdeploy::VARIANT {
namespace {
struct Isa {
  static constexpr int L = 8, ROWS = 3, FLOAT_ROWS = 6, COLUMNS = 2;
  using Ints = __m256i;
  using Floats = __m256;

  static Ints set(int32_t value) { return _mm256_set1_epi32(value); }
  static Ints load(const int32_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static void store(int32_t* to, Ints value) { _mm256_storeu_si256((__m256i*)to, value); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
  static Ints mul_ints(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
  static Ints low(Ints bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
  static Ints high(Ints bytes) { return low(_mm256_srli_epi16(bytes, 4)); }
  static Ints whole(Ints bytes) { return bytes; }
  static Ints flip(Ints bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)); }
  static constexpr int middle(int) { return 0; }
  static Ints repeat(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    return set(word);
  }
  template <int BITS>
  static Ints dot(Ints sum, Ints codes, Ints activations) {
#if defined(DOT_VNNI) && defined(__clang__)
    return _mm256_dpbusd_avx_epi32(sum, codes, activations);
#elif defined(DOT_VNNI)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(activations));  // as in avx512.cpp
    return sum;
#else
    const Ints ones = _mm256_set1_epi16(1);
    if (BITS == 4) return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, activations), ones));
    // A pair of products of 8-bit codes does not fit 16 bits; of codes without their lowest bit it does.
    const Ints halves = _mm256_and_si256(_mm256_srli_epi16(codes, 1), _mm256_set1_epi8(127));
    const Ints rest = _mm256_and_si256(codes, _mm256_set1_epi8(1));
    sum = add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(halves, activations), _mm256_set1_epi16(2)));
    return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(rest, activations), ones));
#endif
  }
  static Ints add_up(const Ints v[4]) { return _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3])); }
  static void turn(Ints v[2]) {
    const Ints first = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    v[1] = _mm256_permute2x128_si256(v[0], v[1], 0x31);
    v[0] = first;
  }

  static Floats set_float(float value) { return _mm256_set1_ps(value); }
  static Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
  static Floats load_halves(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
  static void store_halves(uint16_t* to, Floats value) { _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(value, 0)); }
  static Ints load_bytes(const int8_t* from) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
  static void store_floats(float* to, Floats value) { _mm256_storeu_ps(to, value); }
  static Floats as_floats(Ints value) { return _mm256_castsi256_ps(value); }
  static Ints as_ints(Floats value) { return _mm256_castps_si256(value); }
  static Floats to_float(Ints value) { return _mm256_cvtepi32_ps(value); }
  static Floats add_floats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats absolute(Floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats round_even(Floats value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats power_of_two(Floats n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(add(_mm256_cvtps_epi32(n), set(127)), 23));
  }

  static float largest(const float* x, int group) {
    Ints most = set(0);
    for (int i = 0; i < group; i += 8) most = _mm256_max_epi32(most, _mm256_and_si256(load((const int32_t*)x + i), set(0x7fffffff)));
    alignas(32) int32_t each[8];
    store(each, most);
    int32_t bits = 0;
    for (int32_t one : each) bits = one > bits ? one : bits;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  static int32_t round(const float* x, int group, float inverse, int8_t* codes) {
    Ints total = set(0);
    for (int i = 0; i < group; i += 8) {
      const Ints rounded = _mm256_cvtps_epi32(mul(load_floats(x + i), set_float(inverse)));
      total = add(total, rounded);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      _mm_storel_epi64((__m128i*)(codes + i), _mm_packs_epi16(words, words));
    }
    alignas(32) int32_t each[8];
    store(each, total);
    int32_t sum = 0;
    for (int32_t one : each) sum += one;
    return sum;
  }

  static void transpose(Ints v[8]) {
    Ints t[8];
    for (int i = 0; i < 8; i += 4) {
      const Ints a = _mm256_unpacklo_epi32(v[i], v[i + 1]), b = _mm256_unpackhi_epi32(v[i], v[i + 1]);
      const Ints c = _mm256_unpacklo_epi32(v[i + 2], v[i + 3]), d = _mm256_unpackhi_epi32(v[i + 2], v[i + 3]);
      t[i] = _mm256_unpacklo_epi64(a, c), t[i + 1] = _mm256_unpackhi_epi64(a, c);
      t[i + 2] = _mm256_unpacklo_epi64(b, d), t[i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x20);
      v[i + 4] = _mm256_permute2x128_si256(t[i], t[i + 4], 0x31);
    }
  }
};
}  // namespace

#include "product.inl"
#include "attention.inl"

// Of features that compilers' own lists lack. words: eax, ebx, ecx, edx.
static bool cpuid_bit(unsigned leaf, unsigned subleaf, int word, int bit) {
  unsigned words[4];
  return __get_cpuid_count(leaf, subleaf, &words[0], &words[1], &words[2], &words[3]) && (words[word] >> bit & 1);
}
bool runs_here() {
  const bool has_f16c = cpuid_bit(1, 0, 2, 29);
#ifdef DOT_VNNI
  if (!cpuid_bit(7, 1, 0, 4)) return false;
#endif
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
}
extern const Variant variant = {NAME, runs_here, 2 * Isa::L, round_row, multiply, write_cache, attend};
}  // namespace vlmdeploy::VARIANT
END_INSTRUCTIONS
