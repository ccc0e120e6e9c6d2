// Launches the routed int4 kernels: chooses one by GPU, types and number of tokens, loads its image once for each CUDA
// context, packs its arguments, computes its grid. Knows nothing of TensorRT.
//
// All pointers are of the device and 16-byte aligned. Every function may be called from several threads.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda_driver.h"
#include "kernel_table.h"
#include "status.h"

namespace vlmdeploy {

// order: the rows of expert 0, ascending, then all others, ascending. language_count: how many are of expert 0.
struct PartitionCall {
    const void* experts;  // int32 [tokens]
    std::int64_t tokens;
    void* order;           // int32 [tokens]
    void* language_count;  // int32 [1]
};

// y = x · dequantized weights of each row's expert + its bias.
struct LinearCall {
    Activation activation;
    int group_size;
    const void* x;               // fp16 or bf16 [tokens, groups * group_size]
    const void* experts;         // int32 [tokens]
    const void* order;           // int32 [tokens], of a partition
    const void* language_count;  // int32 [1], of a partition
    const void* codes;           // uint8 [2, out_width, groups * group_size / 2]
    const void* scales;          // fp16 [2, groups, out_width]
    const void* bias;            // fp32 [2, out_width]
    std::int64_t tokens;
    std::int64_t out_width;
    std::int64_t groups;
    void* y;  // as x [tokens, out_width]
};

class Launcher {
  public:
    // find_driver: asked when first needed; returns null and fills in the reason where there is no driver.
    Launcher(const KernelTable& table, std::function<const CudaDriver*(std::string&)> find_driver);

    // Whether the GPU of the current context has kernels for a linear, or for the partition; loads them all, so that
    // no later launch has to load one while a CUDA graph is captured.
    Status prepare_linear(Activation activation, int group_size);
    Status prepare_partition();

    // Enqueue on a stream (a CUstream or cudaStream_t). Without tokens nothing is launched.
    Status partition(const PartitionCall& call, void* stream);
    Status linear(const LinearCall& call, void* stream);

    const KernelTable& table() const { return table_; }

  private:
    struct Context {
        unsigned long long id = 0;  // unlike its address never used again
        int architecture = 0;
    };

    Status find_context(Context& context);
    Status find_architecture(Context& context);
    Status find_function(const Context& context, const Kernel& kernel, void*& function);
    Status load_function(const Context& context, const Kernel& kernel, void*& function);
    Status launch(const Context& context, const Kernel& kernel, std::int64_t grid_x, std::int64_t grid_y,
                  void** arguments, void* stream);
    Status check(int result, const std::string& doing) const;
    Status no_kernel(int architecture, const std::string& what) const;

    const KernelTable& table_;
    const std::function<const CudaDriver*(std::string&)> find_driver_;
    const CudaDriver* driver_ = nullptr;
    std::mutex mutex_;  // guards what follows, and driver_
    std::map<unsigned long long, int> architectures_;
    std::map<std::pair<unsigned long long, const void*>, void*> modules_;  // by context and image; never unloaded
    std::map<std::pair<unsigned long long, const Kernel*>, void*> functions_;
};

// The launcher of this process: the embedded kernels on the driver of this machine. Tests define their own.
Launcher& process_launcher();

}  // namespace vlmdeploy
