#include "routed_plugin.h"

#include <exception>

#include "plugin_log.h"

namespace vlmdeploy {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

const char* type_name(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "FLOAT";
        case DataType::kHALF: return "HALF";
        case DataType::kINT8: return "INT8";
        case DataType::kINT32: return "INT32";
        case DataType::kBOOL: return "BOOL";
        case DataType::kUINT8: return "UINT8";
        case DataType::kBF16: return "BF16";
        case DataType::kINT64: return "INT64";
        case DataType::kINT4: return "INT4";
        default: return "of another type";
    }
}

bool is_activation(DataType type) {
    return type == DataType::kHALF || type == DataType::kBF16;
}

Activation activation_of(DataType type) {
    return type == DataType::kHALF ? Activation::fp16 : Activation::bf16;
}

DataType wanted_type(int input) {
    switch (input) {
        case kCodes: return DataType::kINT8;
        case kScales: return DataType::kHALF;
        case kBias: return DataType::kFLOAT;
        default: return DataType::kINT32;  // experts, order, language_count
    }
}

Status wrong_type(const char* input, DataType found, const char* expected) {
    return failure(std::string(input) + " is " + type_name(found) + ", expected " + expected);
}

Shape shape_of(const nvinfer1::Dims& dims) {
    Shape shape;
    shape.num_axes = dims.nbDims < 0 ? 0 : dims.nbDims > Shape::kMostAxes ? Shape::kMostAxes : dims.nbDims;
    for (int axis = 0; axis < shape.num_axes; ++axis) {
        shape.size[axis] = dims.d[axis] < 0 ? kUnknown : static_cast<std::int64_t>(dims.d[axis]);
    }
    return shape;
}

Shape shape_of(const nvinfer1::DimsExprs& dims) {
    nvinfer1::Dims known{};
    known.nbDims = dims.nbDims;
    for (int axis = 0; axis < dims.nbDims && axis < Shape::kMostAxes; ++axis) {
        const nvinfer1::IDimensionExpr* size = dims.d[axis];
        known.d[axis] = size != nullptr && size->isConstant() ? size->getConstantValue() : kUnknown;
    }
    return shape_of(known);
}

Shape shape_of(const nvinfer1::PluginTensorDesc& tensor) {
    return shape_of(tensor.dims);
}
Shape shape_of(const nvinfer1::DynamicPluginTensorDesc& tensor) {
    return shape_of(tensor.desc.dims);
}

template <typename Item>
std::vector<Shape> shapes_of(const Item* items, std::int32_t count) {
    std::vector<Shape> shapes;
    for (std::int32_t index = 0; index < count; ++index) {
        shapes.push_back(shape_of(items[index]));
    }
    return shapes;
}

DataType type_of(const nvinfer1::PluginTensorDesc& tensor) {
    return tensor.type;
}
DataType type_of(const nvinfer1::DynamicPluginTensorDesc& tensor) {
    return tensor.desc.type;
}

template <typename Item>
std::vector<DataType> types_of(const Item* items, std::int32_t count) {
    std::vector<DataType> types;
    for (std::int32_t index = 0; index < count; ++index) {
        types.push_back(type_of(items[index]));
    }
    return types;
}

}  // namespace

RoutedPlugin::RoutedPlugin(const char* name, std::int32_t group_size) : name_(name), group_size_(group_size) {
    fields_.emplace_back(kFormatField, &field_format_, PluginFieldType::kINT32, 1);
    if (group_size_ != 0) {
        fields_.emplace_back(kGroupSizeField, &group_size_, PluginFieldType::kINT32, 1);
    }
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
}

template <typename Step>
std::int32_t RoutedPlugin::report(Step&& step) const noexcept {
    try {
        const Status status = step();
        if (status.ok()) {
            return 0;
        }
        say(name_, status.message.c_str());
    } catch (const std::exception& error) {
        say(name_, error.what());
    }
    return 1;
}

nvinfer1::IPluginCapability* RoutedPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* RoutedPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

Status RoutedPlugin::check_counts(std::int32_t num_inputs, std::int32_t num_outputs) const {
    const std::int32_t wanted = group_size_ == 0 ? 1 : static_cast<std::int32_t>(kNumLinearInputs);
    if (num_inputs == wanted && num_outputs == getNbOutputs()) {
        return {};
    }
    return failure("there are " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
                   " outputs, expected " + std::to_string(wanted) + " and " + std::to_string(getNbOutputs()));
}

std::int32_t RoutedPlugin::getOutputDataTypes(DataType* outputs, std::int32_t num_outputs, const DataType* inputs,
                                              std::int32_t num_inputs) const noexcept {
    return report([&] {
        Status status = check_counts(num_inputs, num_outputs);
        if (status.ok()) {
            status = check_types({inputs, inputs + num_inputs});
        }
        for (std::int32_t index = 0; status.ok() && index < num_outputs; ++index) {
            outputs[index] = output_type(inputs);
        }
        return status;
    });
}

std::int32_t RoutedPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t num_inputs,
                                           const nvinfer1::DimsExprs*, std::int32_t num_shape_inputs,
                                           nvinfer1::DimsExprs* outputs, std::int32_t num_outputs,
                                           nvinfer1::IExprBuilder& builder) noexcept {
    return report([&] {
        Status status = check_counts(num_inputs, num_outputs);
        if (status.ok() && num_shape_inputs != 0) {
            status = failure("there are " + std::to_string(num_shape_inputs) + " shape inputs, expected none");
        }
        if (status.ok()) {
            status = check_shapes(shapes_of(inputs, num_inputs));
        }
        if (status.ok()) {
            infer_shapes(inputs, outputs, builder);
        }
        return status;
    });
}

template <typename Item>
Status RoutedPlugin::check_and_prepare(const Item* inputs, std::int32_t num_inputs, std::int32_t num_outputs) const {
    Status status = check_counts(num_inputs, num_outputs);
    if (!status.ok()) {
        return status;
    }
    const std::vector<DataType> types = types_of(inputs, num_inputs);
    status = check_types(types);
    if (status.ok()) {
        status = check_shapes(shapes_of(inputs, num_inputs));
    }
    return status.ok() ? prepare(types.data()) : status;
}

std::int32_t RoutedPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t num_inputs,
                                           const nvinfer1::DynamicPluginTensorDesc*,
                                           std::int32_t num_outputs) noexcept {
    return report([&] { return check_and_prepare(inputs, num_inputs, num_outputs); });
}

std::int32_t RoutedPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t num_inputs,
                                         const nvinfer1::PluginTensorDesc*, std::int32_t num_outputs) noexcept {
    return report([&] { return check_and_prepare(inputs, num_inputs, num_outputs); });
}

bool RoutedPlugin::supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                             std::int32_t num_inputs, std::int32_t num_outputs) noexcept {
    const std::int32_t wanted = group_size_ == 0 ? 1 : static_cast<std::int32_t>(kNumLinearInputs);
    if (num_inputs != wanted || num_outputs != getNbOutputs() || position < 0 || position >= num_inputs + num_outputs) {
        return false;
    }
    const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) {
        return false;
    }
    if (group_size_ == 0) {
        return tensor.type == DataType::kINT32;
    }
    if (position == kX) {
        return is_activation(tensor.type);
    }
    return tensor.type == (position < num_inputs ? wanted_type(position) : tensors[kX].desc.type);
}

std::int32_t RoutedPlugin::enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                                   const void* const* input_addresses, void* const* output_addresses, void*,
                                   cudaStream_t stream) noexcept {
    return report([&] { return run(inputs, input_addresses, output_addresses, stream); });
}

const nvinfer1::PluginFieldCollection* RoutedPlugin::getFieldsToSerialize() noexcept {
    return &collection_;
}

// RoutedPartition

nvinfer1::IPluginV3* RoutedPartition::clone() noexcept {
    RoutedPartition* copy = nullptr;
    report([&] {
        copy = new RoutedPartition();
        return Status{};
    });
    return copy;
}

Status RoutedPartition::check_types(const std::vector<DataType>& inputs) const {
    return inputs[0] == DataType::kINT32 ? Status{} : wrong_type("experts", inputs[0], "INT32");
}

void RoutedPartition::infer_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                   nvinfer1::IExprBuilder& builder) const {
    outputs[0].nbDims = 1;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[1].nbDims = 1;
    outputs[1].d[0] = builder.constant(1);
}

Status RoutedPartition::run(const nvinfer1::PluginTensorDesc* inputs, const void* const* input_addresses,
                            void* const* output_addresses, void* stream) const {
    const PartitionCall call{input_addresses[0], inputs[0].dims.d[0], output_addresses[0], output_addresses[1]};
    return process_launcher().partition(call, stream);
}

// RoutedLinear

nvinfer1::IPluginV3* RoutedLinear::clone() noexcept {
    RoutedLinear* copy = nullptr;
    report([&] {
        copy = new RoutedLinear(group_size_);
        return Status{};
    });
    return copy;
}

Status RoutedLinear::check_types(const std::vector<DataType>& inputs) const {
    if (!is_activation(inputs[kX])) {
        return wrong_type("x", inputs[kX], "HALF or BF16");
    }
    for (int input = kExperts; input < kNumLinearInputs; ++input) {
        if (inputs[input] != wanted_type(input)) {
            return wrong_type(kLinearInputs[input], inputs[input], type_name(wanted_type(input)));
        }
    }
    return {};
}

void RoutedLinear::infer_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                nvinfer1::IExprBuilder&) const {
    outputs[0].nbDims = 2;
    outputs[0].d[0] = inputs[kX].d[0];
    outputs[0].d[1] = inputs[kCodes].d[1];
}

Status RoutedLinear::prepare(const DataType* inputs) const {
    return process_launcher().prepare_linear(activation_of(inputs[kX]), group_size_);
}

Status RoutedLinear::run(const nvinfer1::PluginTensorDesc* inputs, const void* const* input_addresses,
                         void* const* output_addresses, void* stream) const {
    LinearCall call{};
    call.activation = activation_of(inputs[kX].type);
    call.group_size = group_size_;
    call.x = input_addresses[kX];
    call.experts = input_addresses[kExperts];
    call.order = input_addresses[kOrder];
    call.language_count = input_addresses[kLanguageCount];
    call.codes = input_addresses[kCodes];
    call.scales = input_addresses[kScales];
    call.bias = input_addresses[kBias];
    call.tokens = inputs[kX].dims.d[0];
    call.out_width = inputs[kCodes].dims.d[1];
    call.groups = inputs[kScales].dims.d[1];
    call.y = output_addresses[0];
    return process_launcher().linear(call, stream);
}

}  // namespace vlmdeploy
