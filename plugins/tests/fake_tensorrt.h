// What TensorRT puts around a plugin, for tests: a logger, size expressions, descriptions of tensors, and calls through
// the interfaces that it calls.

#pragma once

#include <deque>
#include <memory>

#include "checks.h"
#include "fake_driver.h"
#include "routed_plugin.h"

namespace fake {

using namespace nvinfer1;

class Logger : public ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        CHECK(severity == Severity::kERROR);
        lines.emplace_back(message);
    }

    std::vector<std::string> lines;
};

class Finder : public ILoggerFinder {
  public:
    ILogger* findLogger() override { return logger; }

    ILogger* logger = nullptr;
};

inline vlmdeploy::Launcher* current_launcher = nullptr;

struct Bench {
    Bench() {
        fake::state = &state;
        current_launcher = &launcher;
        finder.logger = &logger;
        setLoggerFinder(&finder);
    }
    ~Bench() { setLoggerFinder(nullptr); }

    std::string said() const {
        CHECK_EQUAL(logger.lines.size(), 1u);
        return logger.lines.empty() ? "" : logger.lines.back();
    }

    State state;
    vlmdeploy::Launcher launcher{table, find_driver};
    Logger logger;
    Finder finder;
};

class Size : public IDimensionExpr, public apiv::VDimensionExpr {
  public:
    explicit Size(std::int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const override { return value_ >= 0; }
    std::int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

  private:
    std::int64_t value_;
};

class Builder : public IExprBuilder, public apiv::VExprBuilder {
  public:
    Builder() { mImpl = this; }
    const IDimensionExpr* constant(std::int64_t value) override {
        sizes.push_back(std::make_unique<Size>(value));
        return sizes.back().get();
    }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(std::int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
        return nullptr;
    }

    std::deque<std::unique_ptr<Size>> sizes;
};

using Sizes = std::vector<std::int64_t>;

constexpr std::int64_t kAny = -1;  // a size that is not known while an engine is built
inline const std::vector<Sizes> kLinearSizes = {{kAny, 256}, {kAny}, {kAny}, {1}, {2, 96, 128}, {2, 2, 96}, {2, 96}};
inline const std::vector<DataType> kLinearTypes = {DataType::kHALF,  DataType::kINT32, DataType::kINT32,
                                                   DataType::kINT32, DataType::kINT8,  DataType::kHALF,
                                                   DataType::kFLOAT};

inline PluginTensorDesc tensor(const Sizes& sizes, DataType type, TensorFormat format = TensorFormat::kLINEAR) {
    PluginTensorDesc desc{};
    desc.dims.nbDims = static_cast<std::int32_t>(sizes.size());
    for (std::size_t axis = 0; axis < sizes.size() && axis < 8; ++axis) {
        desc.dims.d[axis] = sizes[axis];
    }
    desc.type = type;
    desc.format = format;
    return desc;
}

inline std::vector<PluginTensorDesc> tensors(const std::vector<Sizes>& sizes, const std::vector<DataType>& types) {
    std::vector<PluginTensorDesc> found;
    for (std::size_t index = 0; index < sizes.size(); ++index) {
        found.push_back(tensor(sizes[index], types[index]));
    }
    return found;
}

inline std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& descriptions) {
    std::vector<DynamicPluginTensorDesc> found;
    for (const PluginTensorDesc& desc : descriptions) {
        found.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
    return found;
}

inline std::vector<PluginTensorDesc> linear_tensors(std::int64_t tokens) {
    std::vector<Sizes> sizes = kLinearSizes;
    sizes[0][0] = sizes[1][0] = sizes[2][0] = tokens;
    sizes.push_back({tokens, 96});
    std::vector<DataType> types = kLinearTypes;
    types.push_back(types[0]);
    return tensors(sizes, types);
}

inline IPluginCreatorV3One& creator(int index) {
    std::int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    CHECK_EQUAL(count, 2);
    return static_cast<IPluginCreatorV3One&>(*creators[index]);
}

inline std::unique_ptr<IPluginV3> create(int index, const std::vector<PluginField>& fields, TensorRTPhase phase,
                                         const char* layer = "layer_7") {
    PluginFieldCollection collection{};
    collection.nbFields = static_cast<std::int32_t>(fields.size());
    collection.fields = fields.data();
    return std::unique_ptr<IPluginV3>(creator(index).createPlugin(layer, &collection, phase));
}

constexpr int kPartition = 0;
constexpr int kLinear = 1;

inline std::unique_ptr<IPluginV3> linear(std::int32_t group_size = 128) {
    return create(kLinear, {{"group_size", &group_size, PluginFieldType::kINT32, 1}}, TensorRTPhase::kBUILD);
}

inline std::unique_ptr<IPluginV3> partition() {
    return create(kPartition, {}, TensorRTPhase::kBUILD);
}

inline IPluginV3OneCore& core(IPluginV3& plugin) {
    return static_cast<IPluginV3OneCore&>(*plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}

inline IPluginV3OneBuild& build(IPluginV3& plugin) {
    return static_cast<IPluginV3OneBuild&>(*plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

inline IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return static_cast<IPluginV3OneRuntime&>(*plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// The shapes that a plugin infers, -1 for what is not known; empty where it refuses.
inline std::vector<Sizes> inferred(IPluginV3& plugin, const std::vector<Sizes>& inputs, int num_outputs) {
    Builder builder;
    std::vector<DimsExprs> given(inputs.size());
    for (std::size_t index = 0; index < inputs.size(); ++index) {
        given[index].nbDims = static_cast<std::int32_t>(inputs[index].size());
        for (std::size_t axis = 0; axis < inputs[index].size(); ++axis) {
            given[index].d[axis] = builder.constant(inputs[index][axis]);
        }
    }
    std::vector<DimsExprs> outputs(static_cast<std::size_t>(num_outputs));
    const std::int32_t result = build(plugin).getOutputShapes(given.data(), static_cast<std::int32_t>(given.size()),
                                                              nullptr, 0, outputs.data(), num_outputs, builder);
    std::vector<Sizes> found;
    for (const DimsExprs& output : outputs) {
        Sizes sizes;
        for (int axis = 0; result == 0 && axis < output.nbDims; ++axis) {
            sizes.push_back(output.d[axis]->getConstantValue());
        }
        found.push_back(sizes);
    }
    return result == 0 ? found : std::vector<Sizes>{};
}

}  // namespace fake
