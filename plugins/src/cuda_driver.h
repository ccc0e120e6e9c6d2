// The few functions of the CUDA driver that a launch needs, behind pointers: tests put their own there, and the library
// links no CUDA. The signatures are those of libcuda.so.1 with its handles as plain pointers.

#pragma once

#include <string>

namespace vlmdeploy {

struct CudaDriver {
    int (*ctx_get_current)(void** context);
    int (*ctx_get_id)(void* context, unsigned long long* id);
    int (*ctx_get_device)(int* device);
    int (*device_get_attribute)(int* value, int attribute, int device);
    int (*module_load_data)(void** module, const void* image);
    int (*module_get_function)(void** function, void* module, const char* name);
    int (*func_set_attribute)(void* function, int attribute, int value);
    int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                         unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments,
                         void** extra);
    int (*get_error_string)(int error, const char** text);
};

// Numbers of cuda.h.
constexpr int kComputeCapabilityMajor = 75;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeCapabilityMinor = 76;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kMaxDynamicSharedBytes = 8;             // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedBytesWithoutAsking = 48 * 1024;  // what a block may have without that attribute

// The driver of this machine, loaded at the first call; null where there is none, then `problem` says why.
const CudaDriver* cuda_driver(std::string& problem);

}  // namespace vlmdeploy
