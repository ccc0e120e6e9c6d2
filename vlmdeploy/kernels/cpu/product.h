// y = x W^T with quantized W: what every variant of the kernel computes, and the table of variants.
//
// Codes and scales lie as ONNX Runtime's MatMulNBits stores them, so a bundle's mapped file is read as it is. Activations
// are rounded to int8 per row and group, as that operator does at accuracy level 4. Each output is
//   sum over groups, in order: float(sum of (code - zero) * activation) * (scale of the group * scale of the activations)
// with exact integer sums and fused multiply-adds: a row's result depends neither on the rows beside it nor on the variant.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vlmdeploy {

struct Weights {
  int64_t outputs, width;     // W is [outputs, width]
  int bits, group;            // 4 or 8; 32, 64 or 128, a divisor of width
  bool half_scales;           // fp16 instead of float32
  const uint8_t* codes;       // [outputs, width * bits / 8]; of 4 bits, the first code of a byte is the low half
  const void* scales;         // [outputs, width / group]
  const uint8_t* zeros;       // [outputs, bytes of width / group codes], or null: 2^(bits - 1) everywhere
  const float* bias;          // [outputs], or null
};

// Rows of activations, rounded: codes [rows, width] in the order in which the kernel reads them; per row and group the
// scale (NaN where a value is not finite) and the sum of the codes.
struct Rows {
  int64_t count;
  int8_t* codes;
  float* scales;
  int32_t* sums;
};

// What follows the product y'. swiglu: y[n] = silu(y'[n]) * y'[n + outputs / 2] for the first half of the outputs; gelu: by erf.
enum class Then { nothing, swiglu, gelu };

struct Attention;

struct Variant {
  const char* name;
  bool (*runs_here)();
  int tile;  // outputs that are computed together
  void (*round_row)(const float* x, int64_t width, int group, int bits, int8_t* codes, float* scales, int32_t* sums);
  // Outputs of tiles first to last (exclusive) for all rows; y [rows, outputs] or, after swiglu, [rows, outputs / 2].
  void (*multiply)(const Weights&, const Rows&, Then, float* y, int64_t first_tile, int64_t last_tile);
  void (*write_cache)(const Attention&, int64_t first_row, int64_t last_row);
  void (*attend)(const Attention&, int64_t kv_head, int64_t first_row, int64_t last_row);  // after all rows are written
};

const Variant* variants();  // fastest first, ended by a null name; the last, plain one runs everywhere

}  // namespace vlmdeploy
