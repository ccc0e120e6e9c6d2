// A CUDA driver that records what is asked of it, and a small table of kernels for it.

#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "kernel_table.h"

namespace fake {

struct Launch {
    std::string symbol;
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    std::vector<std::uint64_t> arguments;  // pointers and integers as they were packed
};

struct SharedRequest {
    std::string symbol;
    int attribute;
    int value;
};

// What the driver says and what it heard. A test begins by putting a fresh one here.
struct State {
    void* context = reinterpret_cast<void*>(0x10);
    unsigned long long context_id = 1;
    int major = 8, minor = 7;
    const char* failing = "";  // the function that fails, with error 209
    std::vector<const void*> loaded_images;
    std::vector<SharedRequest> shared_requests;
    std::vector<Launch> launches;
    std::mutex mutex;
};

inline State* state = nullptr;

// A module is the address of its image, a function that of its name in the table.
inline const char* argument_kinds(const std::string& symbol) {
    return symbol.find("partition") != std::string::npos ? "pipp" : "pppppppiiip";  // pointer or int32
}

inline int result_of(const char* function) {
    return std::strcmp(state->failing, function) == 0 ? 209 : 0;
}

inline int ctx_get_current(void** context) {
    *context = state->context;
    return result_of("ctx_get_current");
}

inline int ctx_get_id(void*, unsigned long long* id) {
    *id = state->context_id;
    return result_of("ctx_get_id");
}

inline int ctx_get_device(int* device) {
    *device = 3;
    return result_of("ctx_get_device");
}

inline int device_get_attribute(int* value, int attribute, int device) {
    *value = device != 3 ? -1 : attribute == 75 ? state->major : attribute == 76 ? state->minor : -1;
    return result_of("device_get_attribute");
}

inline int module_load_data(void** module, const void* image) {
    const std::lock_guard<std::mutex> lock(state->mutex);
    if (result_of("module_load_data") != 0) {
        return 209;
    }
    state->loaded_images.push_back(image);
    *module = const_cast<void*>(image);
    return 0;
}

inline int module_get_function(void** function, void*, const char* name) {
    *function = const_cast<char*>(name);
    return result_of("module_get_function");
}

inline int func_set_attribute(void* function, int attribute, int value) {
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->shared_requests.push_back({static_cast<const char*>(function), attribute, value});
    return result_of("func_set_attribute");
}

inline int launch_kernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                         void**) {
    const std::lock_guard<std::mutex> lock(state->mutex);
    if (result_of("launch_kernel") != 0) {
        return 209;
    }
    Launch launch{static_cast<const char*>(function),
                  grid_x,
                  grid_y,
                  grid_z,
                  block_x,
                  block_y,
                  block_z,
                  shared_bytes,
                  stream,
                  {}};
    for (const char* kind = argument_kinds(launch.symbol); *kind != '\0'; ++kind, ++arguments) {
        std::uint64_t value = 0;
        std::memcpy(&value, *arguments, *kind == 'p' ? sizeof(void*) : sizeof(std::int32_t));
        launch.arguments.push_back(value);
    }
    state->launches.push_back(launch);
    return 0;
}

inline int get_error_string(int error, const char** text) {
    *text = error == 209 ? "no kernel image is available" : nullptr;
    return error == 209 ? 0 : 1;
}

inline const vlmdeploy::CudaDriver driver{ctx_get_current,      ctx_get_id,       ctx_get_device,
                                          device_get_attribute, module_load_data, module_get_function,
                                          func_set_attribute,   launch_kernel,    get_error_string};

using vlmdeploy::Activation;
using vlmdeploy::Kind;

inline const char images[9][4] = {"P87", "V87", "S87", "L87", "B87", "C87", "D87", "P80", "V80"};

inline const vlmdeploy::Kernel kernels[] = {
    {"routed_partition", 87, Kind::partition, Activation::none, 0, 1, 1, 4, 256, "partition_87", images[0], 4},
    {"routed_gemv.fp16.g128", 87, Kind::gemv, Activation::fp16, 128, 1, 32, 2, 512, "gemv_fp16", images[1], 4},
    {"routed_gemm.fp16.g128.64x64", 87, Kind::gemm, Activation::fp16, 128, 64, 64, 8, 65536, "large_fp16", images[3],
     4},
    {"routed_gemm.fp16.g128.16x64", 87, Kind::gemm, Activation::fp16, 128, 16, 64, 4, 49152, "small_fp16", images[2],
     4},
    {"routed_gemv.bf16.g128", 87, Kind::gemv, Activation::bf16, 128, 1, 32, 2, 512, "gemv_bf16", images[4], 4},
    {"routed_gemm.bf16.g128.64x64", 87, Kind::gemm, Activation::bf16, 128, 64, 64, 8, 20480, "large_bf16", images[5],
     4},
    {"routed_gemm.bf16.g128.16x64", 87, Kind::gemm, Activation::bf16, 128, 16, 64, 4, 8192, "small_bf16", images[6], 4},
    {"routed_partition", 80, Kind::partition, Activation::none, 0, 1, 1, 4, 256, "partition_80", images[7], 4},
};
inline const vlmdeploy::Choice choices[] = {{80, 8, 32}, {87, 2, 64}};
inline const vlmdeploy::KernelTable table{kernels, sizeof kernels / sizeof *kernels, choices, 2, 1};

inline const vlmdeploy::CudaDriver* find_driver(std::string&) {
    return &driver;
}

}  // namespace fake
