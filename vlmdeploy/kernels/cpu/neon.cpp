// 64-bit ARM with dot products: from Cortex-A75 on, Jetson Xavier, Apple M1.
#if defined(__aarch64__)
#define VARIANT neon
#define NAME "neon-dotprod"
#define CPU_HAS_IT getauxval(AT_HWCAP) >> 20 & 1
#include "neon.inl"
#endif
