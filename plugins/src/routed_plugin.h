// RoutedPartition and RoutedLinear as TensorRT plugins (IPluginV3), namespace "vlmdeploy", version "1".
//
// Only what TensorRT asks for is here; shapes.h knows what fits, launcher.h runs the kernels. Every failure is one line
// through TensorRT's logger and a nonzero status or a null plugin; no exception leaves.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "NvInfer.h"
#include "launcher.h"
#include "shapes.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 9)
#error "TensorRT 10.9 or later is needed"
#endif

namespace vlmdeploy {

constexpr const char* kNamespace = "vlmdeploy";
constexpr const char* kVersion = "1";
constexpr const char* kPartitionName = "RoutedPartition";
constexpr const char* kLinearName = "RoutedLinear";
constexpr std::int32_t kFieldFormat = 1;  // of what a plan stores of a plugin
constexpr const char* kFormatField = "format";
constexpr const char* kGroupSizeField = "group_size";

// What both plugins do alike.
class RoutedPlugin : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    RoutedPlugin(const char* name, std::int32_t group_size);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;

    const char* getPluginName() const noexcept override { return name_; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputs, std::int32_t num_outputs,
                                    const nvinfer1::DataType* inputs, std::int32_t num_inputs) const noexcept override;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t num_inputs,
                                 const nvinfer1::DimsExprs* shape_inputs, std::int32_t num_shape_inputs,
                                 nvinfer1::DimsExprs* outputs, std::int32_t num_outputs,
                                 nvinfer1::IExprBuilder& builder) noexcept override;
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t num_inputs,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t num_outputs) noexcept override;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t num_inputs, std::int32_t num_outputs) noexcept override;
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t num_inputs,
                               const nvinfer1::PluginTensorDesc* outputs, std::int32_t num_outputs) noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                         const void* const* input_addresses, void* const* output_addresses, void* workspace,
                         cudaStream_t stream) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

  protected:
    // What differs. Types and descriptions come in the order of the inputs.
    virtual Status check_types(const std::vector<nvinfer1::DataType>& inputs) const = 0;
    virtual Status check_shapes(const std::vector<Shape>& inputs) const = 0;
    virtual nvinfer1::DataType output_type(const nvinfer1::DataType* inputs) const = 0;
    virtual void infer_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                              nvinfer1::IExprBuilder& builder) const = 0;
    virtual Status prepare(const nvinfer1::DataType* inputs) const = 0;
    virtual Status run(const nvinfer1::PluginTensorDesc* inputs, const void* const* input_addresses,
                       void* const* output_addresses, void* stream) const = 0;

    template <typename Step>
    std::int32_t report(Step&& step) const noexcept;

    const char* const name_;
    const std::int32_t group_size_;  // 0: the plugin has none

  private:
    Status check_counts(std::int32_t num_inputs, std::int32_t num_outputs) const;
    template <typename Item>
    Status check_and_prepare(const Item* inputs, std::int32_t num_inputs, std::int32_t num_outputs) const;

    const std::int32_t field_format_ = kFieldFormat;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

class RoutedPartition final : public RoutedPlugin {
  public:
    RoutedPartition() : RoutedPlugin(kPartitionName, 0) {}

    nvinfer1::IPluginV3* clone() noexcept override;
    std::int32_t getNbOutputs() const noexcept override { return 2; }

  protected:
    Status check_types(const std::vector<nvinfer1::DataType>& inputs) const override;
    Status check_shapes(const std::vector<Shape>& inputs) const override { return check_partition_shapes(inputs); }
    nvinfer1::DataType output_type(const nvinfer1::DataType*) const override { return nvinfer1::DataType::kINT32; }
    void infer_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& builder) const override;
    Status prepare(const nvinfer1::DataType*) const override { return process_launcher().prepare_partition(); }
    Status run(const nvinfer1::PluginTensorDesc* inputs, const void* const* input_addresses,
               void* const* output_addresses, void* stream) const override;
};

class RoutedLinear final : public RoutedPlugin {
  public:
    explicit RoutedLinear(std::int32_t group_size) : RoutedPlugin(kLinearName, group_size) {}

    nvinfer1::IPluginV3* clone() noexcept override;
    std::int32_t getNbOutputs() const noexcept override { return 1; }

  protected:
    Status check_types(const std::vector<nvinfer1::DataType>& inputs) const override;
    Status check_shapes(const std::vector<Shape>& inputs) const override {
        return check_linear_shapes(inputs, group_size_);
    }
    nvinfer1::DataType output_type(const nvinfer1::DataType* inputs) const override { return inputs[kX]; }
    void infer_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                      nvinfer1::IExprBuilder& builder) const override;
    Status prepare(const nvinfer1::DataType* inputs) const override;
    Status run(const nvinfer1::PluginTensorDesc* inputs, const void* const* input_addresses,
               void* const* output_addresses, void* stream) const override;
};

class RoutedCreator final : public nvinfer1::IPluginCreatorV3One {
  public:
    // name: one of the two.
    explicit RoutedCreator(const char* name);

    nvinfer1::IPluginV3* createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return name_; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const char* const name_;
    const bool is_linear_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace vlmdeploy

// What TensorRT's IPluginRegistry::loadLibrary looks for, and what our Python reads before it loads anything.
#define VLMDEPLOY_EXPORT extern "C" __attribute__((visibility("default")))

VLMDEPLOY_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
VLMDEPLOY_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count);
// {"plugin_version": "1", "packing": 1, "tensorrt": "11.1", "tensorrt_major": 11, "architectures": [80, 87]}
VLMDEPLOY_EXPORT const char* vlmdeploy_plugin_info();
