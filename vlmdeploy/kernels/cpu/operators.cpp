// The operators QuantizedLinear and GatedLinear of the domain "vlmdeploy" for ONNX Runtime; and `vlmdeploy_product`, the same
// product without it.
//
//   QuantizedLinear(x [..., width], codes, scales, zero_points?, bias?) -> [..., outputs]
//   GatedLinear(the same) -> [..., outputs / 2]: silu of the first half of the outputs times the second half
// Attributes K (width), N (outputs), bits, block_size; codes, scales and zero points as MatMulNBits has them, scales
// float32 or fp16.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "product.h"

namespace vlmdeploy {
namespace avx512 { extern const Variant variant; }
namespace avxvnni { extern const Variant variant; }
namespace avx2 { extern const Variant variant; }
namespace neon { extern const Variant variant; }
namespace plain { extern const Variant variant; }

namespace {

const Variant* const VARIANTS[] = {
#if defined(__x86_64__)
    &avx512::variant, &avxvnni::variant, &avx2::variant,
#elif defined(__aarch64__)
    &neon::variant,
#endif
    &plain::variant,
};

const Variant& fastest() {
  static const Variant& found = **std::find_if(std::begin(VARIANTS), std::end(VARIANTS), [](auto v) { return v->runs_here(); });
  return found;
}

// Rows that were rounded, in memory of their own.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  void resize(int64_t rows, int64_t width, int64_t groups) {
    codes.resize(rows * width), scales.resize(rows * groups), sums.resize(rows * groups);
  }
};

struct Product {
  const Variant& variant;
  Weights weights;
  Then then;
  const float* x;
  float* y;
  Rows rows;
  int64_t parts;

  int64_t tiles() const {
    const int64_t rows_of_tile = then == Then::swiglu ? variant.tile / 2 : variant.tile;
    const int64_t outputs = then == Then::swiglu ? weights.outputs / 2 : weights.outputs;
    return (outputs + rows_of_tile - 1) / rows_of_tile;
  }
  void round(int64_t row) const {
    const int64_t groups = weights.width / weights.group;
    variant.round_row(x + row * weights.width, weights.width, weights.group, weights.bits, rows.codes + row * weights.width,
                      rows.scales + row * groups, rows.sums + row * groups);
  }
  void part(int64_t index) const {
    const int64_t all = tiles();
    variant.multiply(weights, rows, then, y, all * index / parts, all * (index + 1) / parts);
  }
};

class Kernel {
 public:
  Kernel(const ort::Api& api, Then then) : api_(api), then_(then) {}

  ort::Status* read(const ort::Info* info) {
    struct { const char* name; int64_t* place; } attributes[] = {
        {"K", &width_}, {"N", &outputs_}, {"bits", &bits_}, {"block_size", &group_}};
    for (auto& [name, place] : attributes)
      if (auto* status = api_.call<const ort::Info*, const char*, int64_t*>(ort::INFO_GET_INT, info, name, place)) return status;
    const bool fits = (bits_ == 4 || bits_ == 8) && (group_ == 32 || group_ == 64 || group_ == 128) && width_ > 0 &&
                      outputs_ > 0 && width_ < 1 << 24 && outputs_ < 1 << 30 && width_ % group_ == 0 &&
                      (then_ == Then::nothing || outputs_ % 2 == 0);
    return fits ? nullptr : api_.error("vlmdeploy: bits must be 4 or 8, block_size 32, 64 or 128 and a divisor of K");
  }

  ort::Status* compute(ort::Context* context) {
    Input x, codes, scales, zeros, bias;
    Input* all[] = {&x, &codes, &scales, &zeros, &bias};
    for (size_t i = 0; i < 5; i++)
      if (auto* status = get(context, i, *all[i])) return status;
    const int64_t groups = width_ / group_;
    const bool half_scales = scales.type == ort::HALF;
    if (x.type != ort::FLOAT || x.dims.empty() || x.dims.back() != width_ || codes.type != ort::UINT8 ||
        codes.count != outputs_ * width_ * bits_ / 8 || (scales.type != ort::FLOAT && !half_scales) ||
        scales.count != outputs_ * groups || (zeros.data && (zeros.type != ort::UINT8 || zeros.count != outputs_ * ((groups * bits_ + 7) / 8))) ||
        (bias.data && (bias.type != ort::FLOAT || bias.count != outputs_)))
      return api_.error("vlmdeploy: the sizes or types of an input do not fit K, N, bits and block_size");
    std::vector<int64_t> dims = x.dims;
    dims.back() = then_ == Then::swiglu ? outputs_ / 2 : outputs_;
    ort::Value* value = nullptr;
    if (auto* status = api_.call<ort::Context*, size_t, const int64_t*, size_t, ort::Value**>(ort::CONTEXT_OUTPUT, context, 0, dims.data(), dims.size(), &value))
      return status;
    void* y = nullptr;
    if (auto* status = api_.call<ort::Value*, void**>(ort::GET_TENSOR_DATA, value, &y)) return status;
    const int64_t rows = x.count / width_;
    if (!rows) return nullptr;
    static thread_local Rounded rounded;  // for all operators of a thread: each would keep a prompt's worth
    rounded.resize(rows, width_, groups);
    Product product{fastest(),
                    {outputs_, width_, int(bits_), int(group_), half_scales, (const uint8_t*)codes.data, scales.data,
                     (const uint8_t*)zeros.data, (const float*)bias.data},
                    then_,
                    (const float*)x.data,
                    (float*)y,
                    {rows, rounded.codes.data(), rounded.scales.data(), rounded.sums.data()},
                    0};
    if (rows == 1) product.round(0);
    else if (auto* status = in_parallel(context, [](void* p, size_t i) { ((Product*)p)->round(i); }, rows, product)) return status;
    product.parts = std::min<int64_t>(product.tiles(), rows == 1 ? 8 : 32);
    return in_parallel(context, [](void* p, size_t i) { ((Product*)p)->part(i); }, product.parts, product);
  }

 private:
  struct Input {
    const void* data = nullptr;
    int type = 0;
    int64_t count = 0;
    std::vector<int64_t> dims;
  };

  ort::Status* get(ort::Context* context, size_t index, Input& input) {
    size_t count = 0;
    if (auto* status = api_.call<const ort::Context*, size_t*>(ort::CONTEXT_INPUT_COUNT, context, &count)) return status;
    if (index >= count) return nullptr;
    const ort::Value* value = nullptr;
    if (auto* status = api_.call<const ort::Context*, size_t, const ort::Value**>(ort::CONTEXT_INPUT, context, index, &value)) return status;
    if (!value) return nullptr;
    ort::Shape* shape = nullptr;
    if (auto* status = api_.call<const ort::Value*, ort::Shape**>(ort::GET_SHAPE, value, &shape)) return status;
    size_t num = 0;
    auto* status = api_.call<const ort::Shape*, int*>(ort::GET_ELEMENT_TYPE, shape, &input.type);
    if (!status) status = api_.call<const ort::Shape*, size_t*>(ort::GET_NUM_DIMENSIONS, shape, &num);
    input.dims.resize(num);
    if (!status) status = api_.call<const ort::Shape*, int64_t*, size_t>(ort::GET_DIMENSIONS, shape, input.dims.data(), num);
    api_.release(ort::RELEASE_SHAPE, shape);
    if (status) return status;
    input.count = 1;
    for (int64_t dim : input.dims) input.count *= dim;
    return api_.call<ort::Value*, void**>(ort::GET_TENSOR_DATA, const_cast<ort::Value*>(value), (void**)&input.data);
  }

  ort::Status* in_parallel(ort::Context* context, void (*run)(void*, size_t), size_t parts, Product& product) {
    return api_.call<const ort::Context*, void (*)(void*, size_t), size_t, size_t, void*>(ort::CONTEXT_PARALLEL_FOR, context, run, parts, 0, &product);
  }

  ort::Api api_;
  Then then_;
  int64_t width_ = 0, outputs_ = 0, bits_ = 0, group_ = 0;
};

template <Then THEN>
ort::Operator describe() {
  ort::Operator op{};
  op.version = ort::VERSION;
  op.name = [](const ort::Operator*) { return THEN == Then::swiglu ? "GatedLinear" : "QuantizedLinear"; };
  op.provider = [](const ort::Operator*) -> const char* { return nullptr; };
  op.input_count = [](const ort::Operator*) -> size_t { return 5; };
  op.output_count = [](const ort::Operator*) -> size_t { return 1; };
  op.input_type = [](const ort::Operator*, size_t index) {
    return index == 1 || index == 3 ? ort::UINT8 : index == 2 ? ort::UNDEFINED : ort::FLOAT;
  };
  op.output_type = [](const ort::Operator*, size_t) { return ort::FLOAT; };
  op.input_presence = [](const ort::Operator*, size_t index) { return index > 2 ? ort::OPTIONAL : ort::REQUIRED; };
  op.output_presence = [](const ort::Operator*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.variadic_input_least = op.variadic_input_same = op.variadic_output_least = op.variadic_output_same =
      [](const ort::Operator*) { return 1; };
  op.create_checked = [](const ort::Operator*, const void* table, const ort::Info* info, void** out) -> ort::Status* {
    auto* kernel = new Kernel(ort::Api((const void* const*)table), THEN);
    if (auto* status = kernel->read(info)) {
      delete kernel;
      return status;
    }
    *out = kernel;
    return nullptr;
  };
  op.compute_checked = [](void* kernel, ort::Context* context) { return ((Kernel*)kernel)->compute(context); };
  op.destroy = [](void* kernel) { delete (Kernel*)kernel; };
  op.first_opset = [](const ort::Operator*) { return 1; };
  op.last_opset = [](const ort::Operator*) { return 1 << 30; };
  return op;
}

}  // namespace
}  // namespace vlmdeploy

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Called by ONNX Runtime for the options of each session.
EXPORTED vlmdeploy::ort::Status* RegisterCustomOps(vlmdeploy::ort::Options* options, const vlmdeploy::ort::ApiBase* base) {
  using namespace vlmdeploy;
  const auto* table = base->get_api(ort::VERSION);
  if (!table) return nullptr;  // an older runtime: without operators it runs the functions of the graph
  const ort::Api api(table);
  static const ort::Operator operators[] = {describe<Then::nothing>(), describe<Then::swiglu>()};
  static ort::Domain* domain = nullptr;  // one for all sessions, which it must outlive
  if (domain) return api.call<ort::Options*, ort::Domain*>(ort::OPTIONS_ADD_DOMAIN, options, domain);
  auto* status = api.call<const char*, ort::Domain**>(ort::CREATE_DOMAIN, "vlmdeploy", &domain);
  for (const auto& one : operators)
    if (!status) status = api.call<ort::Domain*, const ort::Operator*>(ort::DOMAIN_ADD, domain, &one);
  return status ? status : api.call<ort::Options*, ort::Domain*>(ort::OPTIONS_ADD_DOMAIN, options, domain);
}

// Name of a variant that runs here, fastest first; null after the last.
EXPORTED const char* vlmdeploy_variant(int index) {
  using namespace vlmdeploy;
  for (const Variant* one : VARIANTS)
    if (one->runs_here() && index-- == 0) return one->name;
  return nullptr;
}

// One product with the variant of this name; 0 if there is none. y [rows, outputs], or [rows, outputs / 2] with swiglu.
EXPORTED int vlmdeploy_product(const char* name, int64_t rows, int64_t outputs, int64_t width, int bits, int group, int half_scales,
                               int swiglu, const float* x, const uint8_t* codes, const void* scales, const uint8_t* zeros,
                               const float* bias, float* y) {
  using namespace vlmdeploy;
  for (const Variant* one : VARIANTS) {
    if (strcmp(one->name, name) || !one->runs_here()) continue;
    Rounded rounded;
    rounded.resize(rows, width, width / group);
    Product product{*one, {outputs, width, bits, group, bool(half_scales), codes, scales, zeros, bias},
                    swiglu ? Then::swiglu : Then::nothing, x, y,
                    {rows, rounded.codes.data(), rounded.scales.data(), rounded.sums.data()}, 1};
    for (int64_t row = 0; row < rows; row++) product.round(row);
    product.part(0);
    return 1;
  }
  return 0;
}
