#include "cuda_driver.h"

#include <dlfcn.h>

namespace vlmdeploy {
namespace {

struct Loaded {
    CudaDriver driver{};
    std::string problem;
};

template <typename Function>
void find(void* library, const char* name, Function& function, std::string& problem) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr && problem.empty()) {
        problem = std::string("libcuda.so.1 has no ") + name + ": expected the driver of CUDA 12 or later";
    }
}

Loaded load() {
    Loaded loaded;
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = dlerror();
        loaded.problem =
            std::string("no CUDA driver: ") + (reason != nullptr ? reason : "libcuda.so.1 cannot be loaded");
        return loaded;
    }
    CudaDriver& driver = loaded.driver;
    find(library, "cuCtxGetCurrent", driver.ctx_get_current, loaded.problem);
    find(library, "cuCtxGetId", driver.ctx_get_id, loaded.problem);
    find(library, "cuCtxGetDevice", driver.ctx_get_device, loaded.problem);
    find(library, "cuDeviceGetAttribute", driver.device_get_attribute, loaded.problem);
    find(library, "cuModuleLoadData", driver.module_load_data, loaded.problem);
    find(library, "cuModuleGetFunction", driver.module_get_function, loaded.problem);
    find(library, "cuFuncSetAttribute", driver.func_set_attribute, loaded.problem);
    find(library, "cuLaunchKernel", driver.launch_kernel, loaded.problem);
    find(library, "cuGetErrorString", driver.get_error_string, loaded.problem);
    return loaded;
}

}  // namespace

const CudaDriver* cuda_driver(std::string& problem) {
    static const Loaded loaded = load();  // once, whichever thread comes first
    problem = loaded.problem;
    return problem.empty() ? &loaded.driver : nullptr;
}

}  // namespace vlmdeploy
