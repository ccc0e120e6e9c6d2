// 128-bit vectors of 64-bit ARM with dot products; PAIRED: with products of two rows and two outputs at once, too.
#include <arm_neon.h>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <sys/auxv.h>
#include <vector>

#include "attention.h"
#include "instructions.h"
#include "product.h"

#ifdef PAIRED
INSTRUCTIONS("arch=armv8.2-a+dotprod+i8mm")
#else
INSTRUCTIONS("arch=armv8.2-a+dotprod")
#endif

namespace vlmdeploy::VARIANT {
namespace {
struct Isa {
  static constexpr int L = 4, ROWS = 6, FLOAT_ROWS = 6, COLUMNS = 4;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static Ints set(int32_t value) { return vdupq_n_s32(value); }
  static Ints load(const int32_t* from) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t*)from)); }
  static void store(int32_t* to, Ints value) { vst1q_s8((int8_t*)to, vreinterpretq_s8_s32(value)); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints subtract(Ints a, Ints b) { return vsubq_s32(a, b); }
  static Ints mul_ints(Ints a, Ints b) { return vmulq_s32(a, b); }
  // Dot products multiply signed bytes.
  static constexpr int middle(int bits) { return 1 << (bits - 1); }
  static Ints centred(uint8x16_t bytes, uint8_t by) { return vreinterpretq_s32_u8(vsubq_u8(bytes, vdupq_n_u8(by))); }
  static Ints low(Ints bytes) { return centred(vandq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(15)), 8); }
  static Ints high(Ints bytes) { return centred(vshrq_n_u8(vreinterpretq_u8_s32(bytes), 4), 8); }
  static Ints whole(Ints bytes) { return centred(vreinterpretq_u8_s32(bytes), 128); }
  static Ints flip(Ints bytes) { return veorq_s32(bytes, vreinterpretq_s32_u8(vdupq_n_u8(128))); }
  static Ints repeat(const int8_t* four) {
    int32_t word;
    memcpy(&word, four, 4);
    return set(word);
  }
  template <int BITS>
  static Ints dot(Ints sum, Ints codes, Ints activations) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(activations));
  }
#ifdef PAIRED
  // sum [2 rows, 2 outputs], both others [2, 8 bytes].
  static Ints dot_pairs(Ints sum, Ints rows, Ints codes) {
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(codes));
  }
  static Ints two_rows(const int8_t* a, const int8_t* b) { return vreinterpretq_s32_s8(vcombine_s8(vld1_s8(a), vld1_s8(b))); }
  static Ints first_words(Ints a, Ints b) { return vzip1q_s32(a, b); }   // a0 b0 a1 b1
  static Ints second_words(Ints a, Ints b) { return vzip2q_s32(a, b); }  // a2 b2 a3 b3
  static Ints lower_halves(Ints a, Ints b) { return vcombine_s32(vget_low_s32(a), vget_low_s32(b)); }
  static Ints upper_halves(Ints a, Ints b) { return vcombine_s32(vget_high_s32(a), vget_high_s32(b)); }
#endif
  static Ints add_up(const Ints v[4]) { return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])); }
  static void turn(Ints*) {}

  static Floats set_float(float value) { return vdupq_n_f32(value); }
  static Floats load_floats(const float* from) { return vld1q_f32(from); }
  static Floats load_halves(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static void store_halves(uint16_t* to, Floats value) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(value))); }
  static Ints load_bytes(const int8_t* from) {
    int32_t word;
    memcpy(&word, from, 4);
    return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(uint32_t(word)))));
  }
  static void store_floats(float* to, Floats value) { vst1q_f32(to, value); }
  static Floats as_floats(Ints value) { return vreinterpretq_f32_s32(value); }
  static Ints as_ints(Floats value) { return vreinterpretq_s32_f32(value); }
  static Floats to_float(Ints value) { return vcvtq_f32_s32(value); }
  static Floats add_floats(Floats a, Floats b) { return vaddq_f32(a, b); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats absolute(Floats a) { return vabsq_f32(a); }
  static Floats min(Floats a, Floats b) { return vminq_f32(a, b); }
  static Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Floats round_even(Floats value) { return vrndnq_f32(value); }
  static Floats power_of_two(Floats n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(add(vcvtnq_s32_f32(n), set(127)), 23));
  }

  static float largest(const float* x, int group) {
    uint32x4_t most = vdupq_n_u32(0);
    for (int i = 0; i < group; i += 4)
      most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffff)));
    const uint32_t bits = vmaxvq_u32(most);
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }

  static int32_t round(const float* x, int group, float inverse, int8_t* codes) {
    Ints sum = set(0);
    for (int i = 0; i < group; i += 8) {
      const Ints a = vcvtnq_s32_f32(mul(load_floats(x + i), set_float(inverse)));
      const Ints b = vcvtnq_s32_f32(mul(load_floats(x + i + 4), set_float(inverse)));
      sum = add(sum, add(a, b));
      vst1_s8(codes + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
    }
    return vaddvq_s32(sum);
  }

  static void transpose(Ints v[4]) {
    const Ints a = vtrn1q_s32(v[0], v[1]), b = vtrn2q_s32(v[0], v[1]), c = vtrn1q_s32(v[2], v[3]), d = vtrn2q_s32(v[2], v[3]);
    v[0] = vcombine_s32(vget_low_s32(a), vget_low_s32(c)), v[1] = vcombine_s32(vget_low_s32(b), vget_low_s32(d));
    v[2] = vcombine_s32(vget_high_s32(a), vget_high_s32(c)), v[3] = vcombine_s32(vget_high_s32(b), vget_high_s32(d));
  }
};
}  // namespace

#include "product.inl"
#include "attention.inl"

bool runs_here() { return CPU_HAS_IT; }
extern const Variant variant = {NAME, runs_here, 2 * Isa::L, round_row, multiply, write_cache, attend};
}  // namespace vlmdeploy::VARIANT
END_INSTRUCTIONS
