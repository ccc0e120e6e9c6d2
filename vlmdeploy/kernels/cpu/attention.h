// Causal attention over a KV cache, and what writes the cache.
//
// Each query row is computed in the same steps, whichever rows stand beside it: blocks of SLOTS slots from the first slot on,
// a running maximum and sum, sums over the head and over a block's slots from first to last.
#pragma once
#include <cstdint>

namespace vlmdeploy {

constexpr int SLOTS = 64, MOST_WIDTH = 1024;  // slots of a block; largest width of a head
constexpr int CACHE_GROUP = 32;  // values of int8 keys and values that share a scale

enum class Stored { fp32, fp16, int8 };

// A cache of keys or of values, [kv_heads, capacity, width]; scales [kv_heads, capacity, ceil(width / CACHE_GROUP)] fp16 of int8.
struct Cache {
  void* data;
  uint16_t* scales;
};

struct Attention {
  int64_t rows, heads, kv_heads, width, capacity;  // width of a head, a multiple of 16
  int64_t first_slot;                              // of the first row
  float scale;                                     // of the scores
  const float* qkv;                                // [rows, (heads + 2 kv_heads) * width]
  const float *cos, *sin;                          // [capacity, width / 2]
  Stored stored;
  Cache keys, values;
  float* y;  // [rows, heads * width]
};

}  // namespace vlmdeploy
