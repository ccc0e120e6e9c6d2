// AVX2 with AVX-VNNI: processors without AVX-512, from Alder Lake on.
#if defined(__x86_64__)
#define VARIANT avxvnni
#define NAME "avx-vnni"
#define DOT_VNNI
#include <cpuid.h>
// The compiler's own list of features does not know this one: leaf 7, subleaf 1, EAX bit 4.
static bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#define CPU_HAS_MORE __builtin_cpu_supports("f16c") && has_avx_vnni()
#include "avx2.inl"
#endif
