#include "launcher.h"

#include <limits>
#include <vector>

namespace vlmdeploy {
namespace {

constexpr std::int64_t kMostBlocksAcross = std::numeric_limits<std::int32_t>::max();  // of a grid, along x
constexpr std::int64_t kMostBlocksDown = 65535;                                       // along y
constexpr int kThreadsOfAWarp = 32;
constexpr std::uintptr_t kAlignment = 16;

std::int64_t blocks(std::int64_t length, std::int64_t block) {
    return (length + block - 1) / block;
}

struct Pointer {
    const char* name;
    const void* address;
};

Status check_pointers(const std::vector<Pointer>& pointers) {
    for (const Pointer& pointer : pointers) {
        if (pointer.address == nullptr) {
            return failure(std::string(pointer.name) + " is a null pointer");
        }
        if (reinterpret_cast<std::uintptr_t>(pointer.address) % kAlignment != 0) {
            return failure(std::string(pointer.name) + " is not aligned to 16 bytes");
        }
    }
    return {};
}

struct Count {
    const char* name;
    std::int64_t value;
};

// Kernels take them as int32; none may be 0 here.
Status check_counts(const std::vector<Count>& counts) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    for (const Count& count : counts) {
        if (count.value < 1 || count.value > most) {
            return failure(std::string(count.name) + " is " + std::to_string(count.value) + ", expected 1 to " +
                           std::to_string(most));
        }
    }
    return {};
}

Status check_call(const PartitionCall& call) {
    const Status status = check_counts({{"tokens", call.tokens}});
    return status.ok()
               ? check_pointers(
                     {{"experts", call.experts}, {"order", call.order}, {"language_count", call.language_count}})
               : status;
}

Status check_call(const LinearCall& call) {
    const Status status = check_counts({{"tokens", call.tokens}, {"out", call.out_width}, {"groups", call.groups}});
    return status.ok() ? check_pointers({{"x", call.x},
                                         {"experts", call.experts},
                                         {"order", call.order},
                                         {"language_count", call.language_count},
                                         {"codes", call.codes},
                                         {"scales", call.scales},
                                         {"bias", call.bias},
                                         {"y", call.y}})
                       : status;
}

std::string linear_text(Activation activation, int group_size) {
    return std::string("a linear with ") + activation_name(activation) + " activations and group_size " +
           std::to_string(group_size);
}

}  // namespace

Launcher::Launcher(const KernelTable& table, std::function<const CudaDriver*(std::string&)> find_driver)
    : table_(table), find_driver_(std::move(find_driver)) {}

Status Launcher::prepare_partition() {
    Context context;
    Status status = find_context(context);
    if (!status.ok()) {
        return status;
    }
    void* function = nullptr;
    const Kernel* kernel = find_partition(table_, context.architecture);
    if (kernel == nullptr) {
        return no_kernel(context.architecture, "the partition");
    }
    return find_function(context, *kernel, function);
}

Status Launcher::prepare_linear(Activation activation, int group_size) {
    Context context;
    Status status = find_context(context);
    if (!status.ok()) {
        return status;
    }
    const std::vector<const Kernel*> kernels = find_linears(table_, context.architecture, activation, group_size);
    if (kernels.empty()) {
        return no_kernel(context.architecture, linear_text(activation, group_size));
    }
    for (const Kernel* kernel : kernels) {
        void* function = nullptr;
        status = find_function(context, *kernel, function);
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

Status Launcher::partition(const PartitionCall& call, void* stream) {
    if (call.tokens == 0) {
        return {};
    }
    Context context;
    Status status = check_call(call);
    if (status.ok()) {
        status = find_context(context);
    }
    if (!status.ok()) {
        return status;
    }
    const Kernel* kernel = find_partition(table_, context.architecture);
    if (kernel == nullptr) {
        return no_kernel(context.architecture, "the partition");
    }
    PartitionCall copy = call;
    auto tokens = static_cast<std::int32_t>(call.tokens);
    void* arguments[] = {&copy.experts, &tokens, &copy.order, &copy.language_count};
    return launch(context, *kernel, 1, 1, arguments, stream);
}

Status Launcher::linear(const LinearCall& call, void* stream) {
    if (call.tokens == 0) {
        return {};
    }
    Context context;
    Status status = check_call(call);
    if (status.ok()) {
        status = find_context(context);
    }
    if (!status.ok()) {
        return status;
    }
    const Kernel* kernel = find_linear(table_, context.architecture, call.activation, call.group_size, call.tokens);
    if (kernel == nullptr) {
        return no_kernel(context.architecture, linear_text(call.activation, call.group_size));
    }
    LinearCall copy = call;
    auto tokens = static_cast<std::int32_t>(call.tokens);
    auto out_width = static_cast<std::int32_t>(call.out_width);
    auto groups = static_cast<std::int32_t>(call.groups);
    void* arguments[] = {&copy.x,     &copy.experts, &copy.order, &copy.language_count,
                         &copy.codes, &copy.scales,  &copy.bias,  &tokens,
                         &out_width,  &groups,       &copy.y};
    const std::int64_t across = blocks(call.out_width, kernel->block_columns);
    // Each expert's rows begin a new block, so one more than there are blocks of rows.
    const std::int64_t down = kernel->kind == Kind::gemv ? call.tokens : blocks(call.tokens, kernel->block_rows) + 1;
    return launch(context, *kernel, across, down, arguments, stream);
}

Status Launcher::launch(const Context& context, const Kernel& kernel, std::int64_t grid_x, std::int64_t grid_y,
                        void** arguments, void* stream) {
    if (grid_x > kMostBlocksAcross || grid_y > kMostBlocksDown) {
        return failure(std::string(kernel.name) + ": a grid of " + std::to_string(grid_x) + " x " +
                       std::to_string(grid_y) + " blocks is more than a GPU takes (" +
                       std::to_string(kMostBlocksAcross) + " x " + std::to_string(kMostBlocksDown) +
                       "): use fewer tokens in one call");
    }
    void* function = nullptr;
    const Status status = find_function(context, kernel, function);
    if (!status.ok()) {
        return status;
    }
    const auto threads = static_cast<unsigned>(kThreadsOfAWarp * kernel.num_warps);
    return check(
        driver_->launch_kernel(function, static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), 1, threads, 1, 1,
                               static_cast<unsigned>(kernel.shared_bytes), stream, arguments, nullptr),
        std::string("launching ") + kernel.name);
}

Status Launcher::find_context(Context& context) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (driver_ == nullptr) {
        std::string problem;
        driver_ = find_driver_(problem);
        if (driver_ == nullptr) {
            return failure(problem);
        }
    }
    void* current = nullptr;
    Status status = check(driver_->ctx_get_current(&current), "asking for the CUDA context");
    if (!status.ok()) {
        return status;
    }
    if (current == nullptr) {
        return failure("this thread has no CUDA context: expected the one that TensorRT runs in");
    }
    status = check(driver_->ctx_get_id(current, &context.id), "asking for the id of the CUDA context");
    return status.ok() ? find_architecture(context) : status;
}

Status Launcher::find_architecture(Context& context) {
    const auto known = architectures_.find(context.id);
    if (known != architectures_.end()) {
        context.architecture = known->second;
        return {};
    }
    int device = 0;
    int major = 0;
    int minor = 0;
    Status status = check(driver_->ctx_get_device(&device), "asking for the GPU of the CUDA context");
    if (status.ok()) {
        status =
            check(driver_->device_get_attribute(&major, kComputeCapabilityMajor, device), "asking for the GPU's kind");
    }
    if (status.ok()) {
        status =
            check(driver_->device_get_attribute(&minor, kComputeCapabilityMinor, device), "asking for the GPU's kind");
    }
    if (status.ok()) {
        context.architecture = major * 10 + minor;
        architectures_[context.id] = context.architecture;
    }
    return status;
}

Status Launcher::find_function(const Context& context, const Kernel& kernel, void*& function) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = functions_.find({context.id, &kernel});
    if (known != functions_.end()) {
        function = known->second;
        return {};
    }
    return load_function(context, kernel, function);
}

Status Launcher::load_function(const Context& context, const Kernel& kernel, void*& function) {
    const std::string name = std::string(kernel.name) + " for SM " + std::to_string(kernel.architecture);
    void*& module = modules_[{context.id, kernel.image}];
    Status status;
    if (module == nullptr) {
        status = check(driver_->module_load_data(&module, kernel.image), "loading " + name);
        if (!status.ok()) {
            module = nullptr;
            return status;
        }
    }
    status = check(driver_->module_get_function(&function, module, kernel.symbol),
                   "finding " + std::string(kernel.symbol) + " in " + name);
    if (status.ok() && kernel.shared_bytes > kSharedBytesWithoutAsking) {
        status = check(driver_->func_set_attribute(function, kMaxDynamicSharedBytes, kernel.shared_bytes),
                       "asking for " + std::to_string(kernel.shared_bytes) + " bytes of shared memory for " + name);
    }
    if (status.ok()) {
        functions_[{context.id, &kernel}] = function;
    }
    return status;
}

Status Launcher::check(int result, const std::string& doing) const {
    if (result == 0) {
        return {};
    }
    const char* text = nullptr;
    const bool is_known = driver_->get_error_string(result, &text) == 0 && text != nullptr;
    return failure(doing + " failed: " + (is_known ? text : "unknown error") + " (CUDA error " +
                   std::to_string(result) + ")");
}

Status Launcher::no_kernel(int architecture, const std::string& what) const {
    for (const int known : architectures(table_)) {
        if (known == architecture) {
            return failure("no kernel of " + what + " for SM " + std::to_string(architecture) + " in this library");
        }
    }
    return failure("no kernel for SM " + std::to_string(architecture) + ": built for " + architecture_list(table_));
}

}  // namespace vlmdeploy
