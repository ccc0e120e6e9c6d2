// Loads a built plugin library as TensorRT does, makes both plugins and enqueues one linear: `library_test LIBRARY`.
// Prints what happens; the libcuda.so.1 of its test prints the launches.

#include <dlfcn.h>

#include <cstdio>
#include <initializer_list>

#include "NvInfer.h"

using namespace nvinfer1;

namespace {

class Logger : public ILogger {
  public:
    void log(Severity, const char* message) noexcept override { std::printf("logged %s\n", message); }
};

class Finder : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return &logger; }

    Logger logger;
};

PluginTensorDesc tensor(DataType type, std::initializer_list<std::int64_t> sizes) {
    PluginTensorDesc desc{};
    desc.type = type;
    for (const std::int64_t size : sizes) {
        desc.dims.d[desc.dims.nbDims++] = size;
    }
    return desc;
}

void run_linear(IPluginV3& plugin) {
    auto& runtime = static_cast<IPluginV3OneRuntime&>(*plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    const PluginTensorDesc tensors[] = {
        tensor(DataType::kHALF, {40, 256}), tensor(DataType::kINT32, {40}),        tensor(DataType::kINT32, {40}),
        tensor(DataType::kINT32, {1}),      tensor(DataType::kINT8, {2, 96, 128}), tensor(DataType::kHALF, {2, 2, 96}),
        tensor(DataType::kFLOAT, {2, 96}),  tensor(DataType::kHALF, {40, 96}),
    };
    alignas(16) static char memory[16];
    void* const addresses[] = {memory, memory, memory, memory, memory, memory, memory};
    std::printf("shapes %d\n", runtime.onShapeChange(tensors, 7, tensors + 7, 1));
    std::printf("enqueued %d\n", runtime.enqueue(tensors, tensors + 7, addresses, addresses, nullptr, nullptr));
}

}  // namespace

int main(int count, char** arguments) {
    void* library = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) {
        std::printf("%s\n", dlerror());
        return 1;
    }
    using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
    Finder finder;
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    std::int32_t num_creators = 0;
    IPluginCreatorInterface* const* creators =
        reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(num_creators);
    const std::int32_t group_size = 128;
    const PluginField field("group_size", &group_size, PluginFieldType::kINT32, 1);
    PluginFieldCollection fields{};
    fields.nbFields = 1;
    fields.fields = &field;
    for (std::int32_t index = 0; index < num_creators; ++index) {
        auto& creator = static_cast<IPluginCreatorV3One&>(*creators[index]);
        std::printf("%s %s %s\n", creator.getPluginNamespace(), creator.getPluginName(), creator.getPluginVersion());
        IPluginV3* plugin = creator.createPlugin("layer", &fields, TensorRTPhase::kBUILD);
        if (plugin != nullptr && index == 1) {
            run_linear(*plugin);
        }
        delete plugin;
    }
    return 0;
}
