// Attention: causal over a KV cache, with what writes the cache; or of all rows to all rows.
//
// Each query row is computed in the same steps, whichever rows stand beside it: blocks of SLOTS slots from the first slot on,
// a running maximum and sum, sums over the head and over a block's slots from first to last.
#pragma once
#include <cstdint>

namespace vlmdeploy {

constexpr int SLOTS = 64, MOST_WIDTH = 1024;  // slots of a block; largest width of a head
constexpr int CACHE_GROUP = 32;  // values of int8 keys and values that share a scale

enum class Stored { fp32, fp16, int8 };

// Keys or values of all slots. Strides in elements, between heads and between slots. Scales of int8: fp16, [kv_heads, capacity,
// width / CACHE_GROUP], for a cache [kv_heads, capacity, width].
struct Cache {
  void* data;
  int64_t head_stride, slot_stride;
  uint16_t* scales;
};

struct Attention {
  bool is_causal;                         // a row sees no later one
  int64_t rows, heads, kv_heads, width;   // width of a head, a multiple of 16, for int8 of CACHE_GROUP
  int64_t first_slot;                     // of the first row
  float scale;                            // of the scores
  const float* qkv;                       // [rows, (heads + 2 kv_heads) * width]
  const float *cos, *sin;                 // [slots, width / 2], or null: no rotation
  Stored stored;
  Cache keys, values;
  float* y;  // [rows, heads * width]
};

}  // namespace vlmdeploy
