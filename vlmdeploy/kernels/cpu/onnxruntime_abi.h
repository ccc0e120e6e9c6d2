// The part of ONNX Runtime's C interface that a library of operators needs.
//
// The package of ONNX Runtime has no headers, so this file declares what we use: functions by their place in the table `OrtApi`,
// whose published order only grows, and the struct that describes an operator, as of version 23 of the interface (ONNX Runtime
// 1.23). A later runtime reads no more of the struct than `version` says.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vlmdeploy::ort {

constexpr uint32_t VERSION = 23;

struct Status;
struct Value;
struct Shape;
struct Domain;
struct Options;
struct Context;
struct Info;

enum ElementType { UNDEFINED = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, HALF = 10 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

// Places of functions in OrtApi.
enum Place {
  CREATE_STATUS = 0,
  GET_TENSOR_DATA = 51,
  GET_ELEMENT_TYPE = 60,
  GET_NUM_DIMENSIONS = 61,
  GET_DIMENSIONS = 62,
  GET_SHAPE = 65,
  CREATE_DOMAIN = 26,
  DOMAIN_ADD = 27,
  OPTIONS_ADD_DOMAIN = 28,
  INFO_GET_FLOAT = 85,
  INFO_GET_INT = 86,
  CONTEXT_INPUT_COUNT = 88,
  CONTEXT_INPUT = 90,
  CONTEXT_OUTPUT = 91,
  RELEASE_STATUS = 93,
  RELEASE_SHAPE = 99,
  CONTEXT_PARALLEL_FOR = 274,
};

class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}
  template <typename... Arguments>
  Status* call(Place place, Arguments... arguments) const {
    return reinterpret_cast<Status* (*)(Arguments...)>(const_cast<void*>(table_[place]))(arguments...);
  }
  Status* error(const char* message) const { return call<int, const char*>(CREATE_STATUS, 1, message); }
  template <typename Thing>
  void release(Place place, Thing* thing) const {
    reinterpret_cast<void (*)(Thing*)>(const_cast<void*>(table_[place]))(thing);
  }

 private:
  const void* const* table_;
};

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

struct Operator {
  uint32_t version;
  void* (*create)(const Operator*, const void*, const Info*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  ElementType (*input_type)(const Operator*, size_t);
  size_t (*input_count)(const Operator*);
  ElementType (*output_type)(const Operator*, size_t);
  size_t (*output_count)(const Operator*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  Presence (*input_presence)(const Operator*, size_t);
  Presence (*output_presence)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*variadic_input_least)(const Operator*);
  int (*variadic_input_same)(const Operator*);
  int (*variadic_output_least)(const Operator*);
  int (*variadic_output_same)(const Operator*);
  Status* (*create_checked)(const Operator*, const void*, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer_shape)(const Operator*, void*);
  int (*first_opset)(const Operator*);
  int (*last_opset)(const Operator*);
  size_t (*may_share)(int**, int**);
  void (*release_may_share)(int*, int*);
  size_t (*shares)(int**, int**);
  void (*release_shares)(int*, int*);
};

}  // namespace vlmdeploy::ort
