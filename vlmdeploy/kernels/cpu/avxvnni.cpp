// AVX2 with AVX-VNNI: processors without AVX-512, from Alder Lake on.
#if defined(__x86_64__)
#define VARIANT avxvnni
#define NAME "avx-vnni"
#define DOT_VNNI
#include "avx2.inl"
#endif
