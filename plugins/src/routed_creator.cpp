// The creators that TensorRT finds in the library, and the three functions that it exports.

#include <exception>
#include <optional>

#include "plugin_log.h"
#include "routed_plugin.h"

namespace vlmdeploy {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct Fields {
    std::optional<std::int64_t> format;
    std::optional<std::int64_t> group_size;
};

// An integer field, whichever width the reader of a graph gave it.
Status read_field(const PluginField& field, std::optional<std::int64_t>& value) {
    const std::string name = field.name;
    if (field.data == nullptr || field.length != 1) {
        return failure(name + " has " + std::to_string(field.length) + " values, expected 1");
    }
    if (field.type == PluginFieldType::kINT32) {
        value = *static_cast<const std::int32_t*>(field.data);
    } else if (field.type == PluginFieldType::kINT64) {
        value = *static_cast<const std::int64_t*>(field.data);
    } else {
        return failure(name + " is a field of type " + std::to_string(static_cast<int>(field.type)) +
                       ", expected an integer");
    }
    return {};
}

// Fields of other names are of the graph's reader, not ours.
Status read_fields(const nvinfer1::PluginFieldCollection* collection, Fields& fields) {
    for (std::int32_t index = 0; collection != nullptr && index < collection->nbFields; ++index) {
        const PluginField& field = collection->fields[index];
        const std::string name = field.name != nullptr ? field.name : "";
        Status status;
        if (name == kFormatField) {
            status = read_field(field, fields.format);
        } else if (name == kGroupSizeField) {
            status = read_field(field, fields.group_size);
        }
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

// format: what a plan stores; a graph has none.
Status check_format(const Fields& fields, nvinfer1::TensorRTPhase phase) {
    const bool is_stored = phase == nvinfer1::TensorRTPhase::kRUNTIME;
    const std::string expected = "expected " + std::to_string(kFieldFormat);
    if (is_stored && !fields.format) {
        return failure("the plan stores no format, " + expected);
    }
    if (fields.format && *fields.format != kFieldFormat) {
        const bool is_newer = *fields.format > kFieldFormat;
        return failure("the plan stores format " + std::to_string(*fields.format) + ", " + expected + ": " +
                       (is_newer ? "use the newer plugin library that it was built with" : "build the engine again"));
    }
    return {};
}

}  // namespace

RoutedCreator::RoutedCreator(const char* name) : name_(name), is_linear_(std::string(name) == kLinearName) {
    if (is_linear_) {
        fields_.emplace_back(kGroupSizeField, nullptr, PluginFieldType::kINT32, 1);
    }
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
}

nvinfer1::IPluginV3* RoutedCreator::createPlugin(const char* layer, const nvinfer1::PluginFieldCollection* collection,
                                                 nvinfer1::TensorRTPhase phase) noexcept {
    try {
        Fields fields;
        Status status = read_fields(collection, fields);
        if (status.ok()) {
            status = check_format(fields, phase);
        }
        if (status.ok() && is_linear_ && !fields.group_size) {
            status = failure("there is no attribute group_size, expected 32, 64 or 128");
        } else if (status.ok() && is_linear_ && !is_group_size(*fields.group_size)) {
            status = failure("group_size is " + std::to_string(*fields.group_size) + ", expected 32, 64 or 128");
        }
        if (status.ok()) {
            if (is_linear_) {
                return new RoutedLinear(static_cast<std::int32_t>(*fields.group_size));
            }
            return new RoutedPartition();
        }
        const std::string where = layer != nullptr && *layer != '\0' ? std::string(layer) + ": " : "";
        say(name_, (where + status.message).c_str());
    } catch (const std::exception& error) {
        say(name_, error.what());
    }
    return nullptr;
}

}  // namespace vlmdeploy

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    vlmdeploy::use_logger_of(finder);
}

nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static vlmdeploy::RoutedCreator partition(vlmdeploy::kPartitionName);
    static vlmdeploy::RoutedCreator linear(vlmdeploy::kLinearName);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&partition, &linear};
    count = 2;
    return creators;
}

const char* vlmdeploy_plugin_info() {
    static const std::string info = [] {
        const vlmdeploy::KernelTable& table = vlmdeploy::process_launcher().table();
        const std::string major = std::to_string(NV_TENSORRT_MAJOR);
        return std::string("{\"plugin_version\": \"") + vlmdeploy::kVersion +
               "\", \"packing\": " + std::to_string(table.packing) + ", \"tensorrt\": \"" + major + "." +
               std::to_string(NV_TENSORRT_MINOR) + "\", \"tensorrt_major\": " + major + ", \"architectures\": [" +
               vlmdeploy::architecture_list(table) + "]}";
    }();
    return info.c_str();
}
