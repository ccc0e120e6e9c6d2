// Functions between INSTRUCTIONS("a,b") and END_INSTRUCTIONS may use these instructions, whatever the machine that compiles has.
#pragma once

#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define INSTRUCTIONS(list) PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define END_INSTRUCTIONS PRAGMA(clang attribute pop)
#else
#define INSTRUCTIONS(list) PRAGMA(GCC push_options) PRAGMA(GCC target(list))
#define END_INSTRUCTIONS PRAGMA(GCC pop_options)
#endif
