// AVX2: every x86 processor of the last ten years.
#if defined(__x86_64__)
#define VARIANT avx2
#define NAME "avx2"
#include "avx2.inl"
#endif
