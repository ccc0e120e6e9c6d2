// Our operators for ONNX Runtime, and what the tests call without it.
//
//   QuantizedLinear(x [..., width], codes, scales, zero_points?, bias?) -> [..., outputs]
//   GatedLinear(the same) -> [..., outputs / 2]: silu of the first half of the outputs times the second half
//   GeluLinear(the same) -> [..., outputs]
// with K (width), N (outputs), bits, block_size; codes, scales and zero points as MatMulNBits has them, scales fp16 or float32.
//   CachedAttention(qkv [rows, (num_heads + 2 kv_num_heads) * head_size], past_key, past_value, seqlens_k,
//     total_sequence_length, cos, sin) -> [rows, num_heads * head_size], present_key, present_value
//   WriteCache(keys and values of the rows, the same) -> present_key, present_value
// as GroupQueryAttention has them, and with Fp16 or Int8 behind the name for such a cache; of int8, past_key_scales and
// past_value_scales follow the inputs, present ones the outputs.
//   EncoderAttention(qkv [images, rows, 3 * width]) -> [images, rows, width]
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

#include "attention.h"
#include "onnxruntime_abi.h"
#include "product.h"

namespace vlmdeploy {
namespace avx512 { extern const Variant variant; }
namespace avxvnni { extern const Variant variant; }
namespace avx2 { extern const Variant variant; }
namespace neon_i8mm { extern const Variant variant; }
namespace neon { extern const Variant variant; }
namespace plain { extern const Variant variant; }

namespace {

const Variant* const VARIANTS[] = {
#if defined(__x86_64__)
    &avx512::variant, &avxvnni::variant, &avx2::variant,
#elif defined(__aarch64__)
    &neon_i8mm::variant, &neon::variant,
#endif
    &plain::variant,
};

const Variant& fastest() {
  static const Variant& found = **std::find_if(std::begin(VARIANTS), std::end(VARIANTS), [](auto v) { return v->runs_here(); });
  return found;
}

const Variant* variant_named(const char* name) {
  for (const Variant* one : VARIANTS)
    if (one->runs_here() && !strcmp(one->name, name)) return one;
  return nullptr;
}

// Rows that were rounded, in memory of their own.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
  void resize(int64_t rows, int64_t width, int64_t groups) {
    codes.resize(rows * width), scales.resize(rows * groups), sums.resize(rows * groups);
  }
  // One for all operators of a thread: each would keep a prompt's worth.
  static Rounded& of_thread() {
    static thread_local Rounded rounded;
    return rounded;
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

// One call of an operator: its inputs and outputs. The first failure stays, and what follows does nothing.
class Call {
 public:
  Call(const ort::Api& api, ort::Context* context) : api_(api), context_(context) {
    check(api_.call<const ort::Context*, size_t*>(ort::CONTEXT_INPUT_COUNT, context_, &count_));
  }

  struct Tensor {
    void* data = nullptr;  // null for an optional input that is missing
    int type = 0;
    int64_t count = 1;
    std::vector<int64_t> dims;
    bool is(int wanted, std::vector<int64_t> sizes) const { return type == wanted && dims == sizes; }
  };

  Tensor input(size_t index) {
    Tensor tensor;
    const ort::Value* value = nullptr;
    if (!status_ && index < count_)
      check(api_.call<const ort::Context*, size_t, const ort::Value**>(ort::CONTEXT_INPUT, context_, index, &value));
    if (!value) return tensor;
    ort::Shape* shape = nullptr;
    if (!check(api_.call<const ort::Value*, ort::Shape**>(ort::GET_SHAPE, value, &shape))) return tensor;
    size_t rank = 0;
    check(api_.call<const ort::Shape*, int*>(ort::GET_ELEMENT_TYPE, shape, &tensor.type));
    check(api_.call<const ort::Shape*, size_t*>(ort::GET_NUM_DIMENSIONS, shape, &rank));
    tensor.dims.resize(rank);
    check(api_.call<const ort::Shape*, int64_t*, size_t>(ort::GET_DIMENSIONS, shape, tensor.dims.data(), rank));
    api_.release(ort::RELEASE_SHAPE, shape);
    for (int64_t dim : tensor.dims) tensor.count *= dim;
    check(api_.call<ort::Value*, void**>(ort::GET_TENSOR_DATA, const_cast<ort::Value*>(value), &tensor.data));
    return tensor;
  }

  void* output(size_t index, const std::vector<int64_t>& dims) {
    ort::Value* value = nullptr;
    void* data = nullptr;
    if (!status_)
      check(api_.call<ort::Context*, size_t, const int64_t*, size_t, ort::Value**>(ort::CONTEXT_OUTPUT, context_, index, dims.data(),
                                                                                   dims.size(), &value));
    if (!status_) check(api_.call<ort::Value*, void**>(ort::GET_TENSOR_DATA, value, &data));
    return data;
  }

  template <typename Work>
  void in_parallel(int64_t parts, const Work& work) {
    if (status_) return;
    if (parts == 1) return work(0);
    void (*run)(void*, size_t) = [](void* work, size_t index) { (*(const Work*)work)(int64_t(index)); };
    check(api_.call<const ort::Context*, void (*)(void*, size_t), size_t, size_t, void*>(ort::CONTEXT_PARALLEL_FOR, context_, run, parts, 0,
                                                                                         (void*)&work));
  }

  void require(bool holds, const char* message) {
    if (!status_ && !holds) status_ = api_.error(message);
  }
  bool ok() const { return !status_; }
  ort::Status* status() const { return status_; }

 private:
  bool check(ort::Status* status) {
    if (!status_) status_ = status;
    else if (status) api_.release(ort::RELEASE_STATUS, status);
    return !status_;
  }

  const ort::Api& api_;
  ort::Context* context_;
  size_t count_ = 0;
  ort::Status* status_ = nullptr;
};

// Attributes of a node that are whole numbers.
class Attributes {
 public:
  Attributes(const ort::Api& api, const ort::Info* info) : api_(api), info_(info) {}
  int64_t operator[](const char* name) {
    int64_t value = 0;
    if (!status) status = api_.call<const ort::Info*, const char*, int64_t*>(ort::INFO_GET_INT, info_, name, &value);
    return value;
  }
  ort::Status* status = nullptr;

 private:
  const ort::Api& api_;
  const ort::Info* info_;
};

template <Then THEN>
class Linear {
 public:
  static constexpr const char* NAME = THEN == Then::swiglu ? "GatedLinear" : THEN == Then::gelu ? "GeluLinear" : "QuantizedLinear";
  static constexpr size_t INPUTS = 5, NEEDED = 3, OUTPUTS = 1;
  static ort::ElementType input_type(size_t index) {
    return index == 1 || index == 3 ? ort::UINT8 : index == 2 ? ort::UNDEFINED : ort::FLOAT;
  }
  static ort::ElementType output_type(size_t) { return ort::FLOAT; }

  Linear(const ort::Api& api, const ort::Info* info, ort::Status*& status) : api_(api) {
    Attributes attributes(api, info);
    width_ = attributes["K"], outputs_ = attributes["N"], bits_ = attributes["bits"], group_ = attributes["block_size"];
    status = attributes.status;
    const bool fits = (bits_ == 4 || bits_ == 8) && (group_ == 32 || group_ == 64 || group_ == 128) && width_ > 0 && width_ < 1 << 24 &&
                      outputs_ > 0 && outputs_ < 1 << 30 && width_ % group_ == 0 && (THEN != Then::swiglu || outputs_ % 2 == 0);
    if (!status && !fits) status = api.error("vlmdeploy: bits must be 4 or 8, block_size 32, 64 or 128 and a divisor of K");
  }

  ort::Status* compute(ort::Context* context) {
    Call call(api_, context);
    const auto x = call.input(0), codes = call.input(1), scales = call.input(2), zeros = call.input(3), bias = call.input(4);
    const int64_t groups = width_ / group_, zero_bytes = (groups * bits_ + 7) / 8;
    const bool half_scales = scales.type == ort::HALF;
    call.require(x.type == ort::FLOAT && !x.dims.empty() && x.dims.back() == width_ && codes.type == ort::UINT8 &&
                     codes.count == outputs_ * width_ * bits_ / 8 && (scales.type == ort::FLOAT || half_scales) &&
                     scales.count == outputs_ * groups && (!zeros.data || (zeros.type == ort::UINT8 && zeros.count == outputs_ * zero_bytes)) &&
                     (!bias.data || (bias.type == ort::FLOAT && bias.count == outputs_)),
                 "vlmdeploy: the sizes or types of an input do not fit K, N, bits and block_size");
    if (!call.ok()) return call.status();
    std::vector<int64_t> dims = x.dims;
    dims.back() = THEN == Then::swiglu ? outputs_ / 2 : outputs_;
    float* y = (float*)call.output(0, dims);
    const int64_t rows = x.count / width_;
    if (!rows || !call.ok()) return call.status();
    Rounded& rounded = Rounded::of_thread();
    rounded.resize(rows, width_, groups);
    Product product{fastest(),
                    {outputs_, width_, int(bits_), int(group_), half_scales, (const uint8_t*)codes.data, scales.data,
                     (const uint8_t*)zeros.data, (const float*)bias.data},
                    THEN,
                    (const float*)x.data,
                    y,
                    {rows, rounded.codes.data(), rounded.scales.data(), rounded.sums.data()},
                    0};
    call.in_parallel(rows, [&](int64_t row) { product.round(row); });
    product.parts = std::min<int64_t>(product.tiles(), rows == 1 ? 16 : 32);
    call.in_parallel(product.parts, [&](int64_t index) { product.part(index); });
    return call.status();
  }

  ort::Api api_;

 private:
  int64_t width_, outputs_, bits_, group_;
};

constexpr int64_t ROWS_AT_ONCE = 128;  // that share a block of keys and values in a core's cache

int64_t blocks_of(int64_t rows) { return (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; }

void attend_block(const Variant& variant, const Attention& at, int64_t kv_head, int64_t block) {
  variant.attend(at, kv_head, block * ROWS_AT_ONCE, std::min((block + 1) * ROWS_AT_ONCE, at.rows));
}

// Queries, keys and values of new rows, the cache, and how much of it is filled.
template <Stored STORED, bool WITH_QUERIES>
class Attending {
 public:
  static constexpr const char* NAME = WITH_QUERIES ? (STORED == Stored::fp32   ? "CachedAttention"
                                                      : STORED == Stored::fp16 ? "CachedAttentionFp16"
                                                                               : "CachedAttentionInt8")
                                                   : (STORED == Stored::fp32   ? "WriteCache"
                                                      : STORED == Stored::fp16 ? "WriteCacheFp16"
                                                                               : "WriteCacheInt8");
  static constexpr bool HAS_SCALES = STORED == Stored::int8;
  static constexpr int64_t MULTIPLE = HAS_SCALES ? CACHE_GROUP : 16;
  static constexpr size_t INPUTS = HAS_SCALES ? 9 : 7, NEEDED = INPUTS, OUTPUTS = (WITH_QUERIES ? 1 : 0) + (HAS_SCALES ? 4 : 2);
  static constexpr ort::ElementType TYPE = STORED == Stored::fp32 ? ort::FLOAT : STORED == Stored::fp16 ? ort::HALF : ort::INT8;
  static ort::ElementType input_type(size_t index) {
    if (index == 1 || index == 2) return TYPE;
    return index == 3 || index == 4 ? ort::INT32 : index > 6 ? ort::HALF : ort::FLOAT;
  }
  static ort::ElementType output_type(size_t index) {
    if (WITH_QUERIES && index-- == 0) return ort::FLOAT;
    return index < 2 ? TYPE : ort::HALF;
  }

  Attending(const ort::Api& api, const ort::Info* info, ort::Status*& status) : api_(api) {
    Attributes attributes(api, info);
    heads_ = WITH_QUERIES ? attributes["num_heads"] : 0, kv_heads_ = attributes["kv_num_heads"], width_ = attributes["head_size"];
    status = attributes.status;
    if (!status && WITH_QUERIES)
      status = api.call<const ort::Info*, const char*, float*>(ort::INFO_GET_FLOAT, info, "scale", &scale_);
    const bool fits = kv_heads_ > 0 && kv_heads_ < 1 << 16 && heads_ >= 0 && heads_ < 1 << 16 && heads_ % kv_heads_ == 0 && width_ > 0 &&
                      width_ <= MOST_WIDTH && width_ % MULTIPLE == 0;
    if (!status && !fits) status = api.error("vlmdeploy: head_size must be a multiple of 16 (int8: 32), num_heads one of kv_num_heads");
  }

  ort::Status* compute(ort::Context* context) {
    Call call(api_, context);
    const auto qkv = call.input(0), filled = call.input(3), cos = call.input(5), sin = call.input(6);
    const Call::Tensor past[4] = {call.input(1), call.input(2), HAS_SCALES ? call.input(7) : Call::Tensor{},
                                  HAS_SCALES ? call.input(8) : Call::Tensor{}};
    const int64_t rows = qkv.dims.empty() ? 0 : qkv.dims[0], capacity = past[0].dims.size() == 4 ? past[0].dims[2] : 0;
    const std::vector<int64_t> sizes{1, kv_heads_, capacity, width_};
    const std::vector<int64_t> table{cos.dims.empty() ? 0 : cos.dims[0], width_ / 2};
    const std::vector<int64_t> scale_sizes{1, kv_heads_, capacity, width_ / CACHE_GROUP};
    bool fits = qkv.is(ort::FLOAT, {rows, (heads_ + 2 * kv_heads_) * width_}) && past[0].is(TYPE, sizes) && past[1].is(TYPE, sizes) &&
                filled.is(ort::INT32, {1}) && cos.is(ort::FLOAT, table) && sin.is(ort::FLOAT, table);
    if (HAS_SCALES) fits = fits && past[2].is(ort::HALF, scale_sizes) && past[3].is(ort::HALF, scale_sizes);
    call.require(fits, "vlmdeploy: the sizes or types of an input do not fit num_heads, kv_num_heads and head_size");
    if (!call.ok()) return call.status();
    const int64_t first_slot = *(const int32_t*)filled.data + 1 - rows;
    call.require(first_slot >= 0 && first_slot + rows <= std::min(capacity, table[0]), "vlmdeploy: seqlens_k is beyond the KV cache");
    float* y = WITH_QUERIES ? (float*)call.output(0, {rows, heads_ * width_}) : nullptr;
    void* now[4] = {};
    for (int i = 0; i < (HAS_SCALES ? 4 : 2); i++) now[i] = call.output(i + (WITH_QUERIES ? 1 : 0), i < 2 ? sizes : scale_sizes);
    if (!call.ok() || !rows) return call.status();
    const int bytes = STORED == Stored::fp32 ? 4 : STORED == Stored::fp16 ? 2 : 1;
    for (int i = 0; i < 4; i++)  // the same memory where the caller binds it so
      if (now[i] && now[i] != past[i].data) memcpy(now[i], past[i].data, past[i].count * (i < 2 ? bytes : 2));
    const Attention at{true, rows, heads_, kv_heads_, width_, first_slot, scale_, (const float*)qkv.data, (const float*)cos.data,
                       (const float*)sin.data, STORED, {now[0], capacity * width_, width_, (uint16_t*)now[2]},
                       {now[1], capacity * width_, width_, (uint16_t*)now[3]}, y};
    const Variant& variant = fastest();
    const int64_t write_parts = rows < 8 ? 1 : std::min<int64_t>(rows / 4, 16);
    call.in_parallel(write_parts, [&](int64_t i) { variant.write_cache(at, rows * i / write_parts, rows * (i + 1) / write_parts); });
    if (!WITH_QUERIES) return call.status();
    const int64_t blocks = blocks_of(rows);
    call.in_parallel(kv_heads_ * blocks, [&](int64_t i) { attend_block(variant, at, i / blocks, i % blocks); });
    return call.status();
  }

  ort::Api api_;

 private:
  int64_t heads_, kv_heads_, width_;
  float scale_ = 0;
};

// Attention of all rows of a picture to all: qkv [images, rows, 3 * heads * width] -> [images, rows, heads * width].
class EncoderAttending {
 public:
  static constexpr const char* NAME = "EncoderAttention";
  static constexpr size_t INPUTS = 1, NEEDED = 1, OUTPUTS = 1;
  static ort::ElementType input_type(size_t) { return ort::FLOAT; }
  static ort::ElementType output_type(size_t) { return ort::FLOAT; }

  EncoderAttending(const ort::Api& api, const ort::Info* info, ort::Status*& status) : api_(api) {
    Attributes attributes(api, info);
    heads_ = attributes["num_heads"], status = attributes.status;
    if (!status && (heads_ < 1 || heads_ >= 1 << 16)) status = api.error("vlmdeploy: num_heads must be 1 or more");
  }

  ort::Status* compute(ort::Context* context) {
    Call call(api_, context);
    const auto qkv = call.input(0);
    const bool is_rows = qkv.type == ort::FLOAT && qkv.dims.size() == 3;
    const int64_t all = is_rows ? qkv.dims[2] / 3 : 0, width = all / heads_;
    call.require(is_rows && qkv.dims[2] == 3 * heads_ * width && width > 0 && width <= MOST_WIDTH && width % 16 == 0,
                 "vlmdeploy: the encoder's heads must have a multiple of 16 values");
    if (!call.ok()) return call.status();
    const int64_t images = qkv.dims[0], rows = qkv.dims[1], blocks = blocks_of(rows);
    float* y = (float*)call.output(0, {images, rows, all});
    if (!call.ok() || !images || !rows) return call.status();
    const Variant& variant = fastest();
    call.in_parallel(images * heads_ * blocks, [&](int64_t i) {
      const int64_t image = i / (heads_ * blocks);
      float* x = (float*)qkv.data + image * rows * 3 * all;  // only read
      const Attention at{false, rows, heads_, heads_, width, 0, 1 / std::sqrt(float(width)), x, nullptr, nullptr, Stored::fp32,
                         {x + all, width, 3 * all, nullptr}, {x + 2 * all, width, 3 * all, nullptr}, y + image * rows * all};
      attend_block(variant, at, i / blocks % heads_, i % blocks);
    });
    return call.status();
  }

  ort::Api api_;

 private:
  int64_t heads_;
};

template <typename Kernel>
ort::Operator describe() {
  ort::Operator op{};
  op.version = ort::VERSION;
  op.name = [](const ort::Operator*) { return Kernel::NAME; };
  op.provider = [](const ort::Operator*) -> const char* { return nullptr; };
  op.input_count = [](const ort::Operator*) { return Kernel::INPUTS; };
  op.output_count = [](const ort::Operator*) { return Kernel::OUTPUTS; };
  op.input_type = [](const ort::Operator*, size_t index) { return Kernel::input_type(index); };
  op.output_type = [](const ort::Operator*, size_t index) { return Kernel::output_type(index); };
  op.input_presence = [](const ort::Operator*, size_t index) { return index < Kernel::NEEDED ? ort::REQUIRED : ort::OPTIONAL; };
  op.output_presence = [](const ort::Operator*, size_t) { return ort::REQUIRED; };
  op.input_memory = [](const ort::Operator*, size_t) { return 0; };
  op.variadic_input_least = op.variadic_input_same = op.variadic_output_least = op.variadic_output_same =
      [](const ort::Operator*) { return 1; };
  op.create_checked = [](const ort::Operator*, const void* table, const ort::Info* info, void** out) -> ort::Status* {
    ort::Status* status = nullptr;
    auto* kernel = new Kernel(ort::Api((const void* const*)table), info, status);
    if (status) delete kernel;
    else *out = kernel;
    return status;
  };
  op.compute_checked = [](void* kernel, ort::Context* context) -> ort::Status* {
    try {
      return ((Kernel*)kernel)->compute(context);
    } catch (const std::exception&) {
      return ((Kernel*)kernel)->api_.error("vlmdeploy: not enough memory");
    }
  };
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
  // Graphs hold functions of those in the first domain, which stand in for them, and of the others none.
  static const ort::Operator with_functions[] = {
      describe<Linear<Then::nothing>>(),         describe<Linear<Then::swiglu>>(),           describe<Linear<Then::gelu>>(),
      describe<Attending<Stored::fp32, true>>(), describe<Attending<Stored::fp32, false>>(), describe<EncoderAttending>()};
  static const ort::Operator others[] = {describe<Attending<Stored::fp16, true>>(), describe<Attending<Stored::fp16, false>>(),
                                         describe<Attending<Stored::int8, true>>(), describe<Attending<Stored::int8, false>>()};
  static ort::Domain* domains[2] = {};  // for all sessions, which they must outlive
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  ort::Status* status = nullptr;
  const auto make = [&](ort::Domain*& domain, const char* name, const auto& operators) {
    if (domain || status) return;
    ort::Domain* made = nullptr;
    status = api.call<const char*, ort::Domain**>(ort::CREATE_DOMAIN, name, &made);
    for (const auto& one : operators)
      if (!status) status = api.call<ort::Domain*, const ort::Operator*>(ort::DOMAIN_ADD, made, &one);
    if (!status) domain = made;
  };
  make(domains[0], "vlmdeploy", with_functions);
  make(domains[1], "vlmdeploy.compiled", others);
  for (ort::Domain* domain : domains)
    if (!status) status = api.call<ort::Options*, ort::Domain*>(ort::OPTIONS_ADD_DOMAIN, options, domain);
  return status;
}

// Name of a variant that runs here, fastest first; null after the last.
EXPORTED const char* vlmdeploy_variant(int index) {
  using namespace vlmdeploy;
  for (const Variant* one : VARIANTS)
    if (one->runs_here() && index-- == 0) return one->name;
  return nullptr;
}

// One product with the variant of this name; 0 if there is none. y [rows, outputs], or [rows, outputs / 2] after swiglu.
EXPORTED int vlmdeploy_product(const char* name, int64_t rows, int64_t outputs, int64_t width, int bits, int group, int half_scales,
                               int then, const float* x, const uint8_t* codes, const void* scales, const uint8_t* zeros,
                               const float* bias, float* y) {
  using namespace vlmdeploy;
  const Variant* variant = variant_named(name);
  if (!variant) return 0;
  Rounded rounded;
  rounded.resize(rows, width, width / group);
  Product product{*variant, {outputs, width, bits, group, bool(half_scales), codes, scales, zeros, bias},
                  Then(then), x, y,
                  {rows, rounded.codes.data(), rounded.scales.data(), rounded.sums.data()}, 1};
  for (int64_t row = 0; row < rows; row++) product.round(row);
  product.part(0);
  return 1;
}

// Attention with the variant of this name: writes the new rows into the cache and attends; 0 if there is none.
EXPORTED int vlmdeploy_attention(const char* name, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width, int64_t capacity,
                                 int64_t first_slot, float scale, int stored, const float* qkv, const float* cos, const float* sin,
                                 void* keys, void* values, uint16_t* key_scales, uint16_t* value_scales, float* y) {
  using namespace vlmdeploy;
  const Variant* variant = variant_named(name);
  if (!variant) return 0;
  const Attention at{true, rows, heads, kv_heads, width, first_slot, scale, qkv, cos, sin, Stored(stored),
                     {keys, capacity * width, width, key_scales}, {values, capacity * width, width, value_scales}, y};
  variant->write_cache(at, 0, rows);
  for (int64_t head = 0; head < kv_heads; head++) variant->attend(at, head, 0, rows);
  return 1;
}
