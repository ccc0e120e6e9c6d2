// 64-bit ARM with int8 matrix products: from Cortex-A710 and Neoverse V1 on.
#if defined(__aarch64__)
#define VARIANT neon_i8mm
#define NAME "neon-i8mm"
#define PAIRED
#define CPU_HAS_IT (getauxval(AT_HWCAP) >> 20 & 1) && (getauxval(AT_HWCAP2) >> 13 & 1)
#include "neon.inl"
#endif
