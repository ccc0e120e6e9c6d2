// Contract of the plugins, called as TensorRT calls them: types, shapes, formats, what a plan stores, one line where
// something does not fit. Compiled with the headers of TensorRT, or with the stand-ins under stub/; no TensorRT
// library.

#include "routed_plugin.h"

#include "checks.h"
#include "fake_tensorrt.h"

namespace {

using namespace nvinfer1;
using namespace fake;

void creators_bear_the_names_of_the_graph() {
    CHECK_EQUAL(std::string(creator(kPartition).getPluginName()), "RoutedPartition");
    CHECK_EQUAL(std::string(creator(kLinear).getPluginName()), "RoutedLinear");
    for (const int index : {kPartition, kLinear}) {
        CHECK_EQUAL(std::string(creator(index).getPluginNamespace()), "vlmdeploy");
        CHECK_EQUAL(std::string(creator(index).getPluginVersion()), "1");
    }
    CHECK_EQUAL(creator(kPartition).getFieldNames()->nbFields, 0);
    CHECK_EQUAL(creator(kLinear).getFieldNames()->nbFields, 1);
    CHECK_EQUAL(std::string(creator(kLinear).getFieldNames()->fields[0].name), "group_size");
}

void plugin_bears_the_name_of_its_creator_and_its_clone_too() {
    Bench bench;
    const auto plugin = linear();
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    const std::unique_ptr<IPluginV3> attached(runtime(*plugin).attachToContext(nullptr));
    for (IPluginV3* item : {plugin.get(), copy.get(), attached.get()}) {
        CHECK_EQUAL(std::string(core(*item).getPluginName()), "RoutedLinear");
        CHECK_EQUAL(std::string(core(*item).getPluginNamespace()), "vlmdeploy");
        CHECK_EQUAL(build(*item).getNbOutputs(), 1);
    }
    CHECK_EQUAL(build(*partition()).getNbOutputs(), 2);
}

void output_of_a_linear_has_the_type_of_x() {
    Bench bench;
    const auto plugin = linear();
    for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
        std::vector<DataType> types = kLinearTypes;
        types[0] = type;
        DataType output = DataType::kBOOL;
        CHECK_EQUAL(build(*plugin).getOutputDataTypes(&output, 1, types.data(), 7), 0);
        CHECK(output == type);
    }
}

void outputs_of_a_partition_are_int32() {
    Bench bench;
    const DataType input = DataType::kINT32;
    DataType outputs[2] = {DataType::kBOOL, DataType::kBOOL};
    CHECK_EQUAL(build(*partition()).getOutputDataTypes(outputs, 2, &input, 1), 0);
    CHECK(outputs[0] == DataType::kINT32 && outputs[1] == DataType::kINT32);
}

void types_that_no_kernel_takes_are_named() {
    const struct {
        int input;
        DataType type;
        const char* said;
    } cases[] = {
        {0, DataType::kFLOAT, "vlmdeploy RoutedLinear: x is FLOAT, expected HALF or BF16"},
        {1, DataType::kINT64, "vlmdeploy RoutedLinear: experts is INT64, expected INT32"},
        {4, DataType::kUINT8, "vlmdeploy RoutedLinear: codes is UINT8, expected INT8"},
        {5, DataType::kFLOAT, "vlmdeploy RoutedLinear: scales is FLOAT, expected HALF"},
        {6, DataType::kHALF, "vlmdeploy RoutedLinear: bias is HALF, expected FLOAT"},
    };
    for (const auto& item : cases) {
        Bench bench;
        std::vector<DataType> types = kLinearTypes;
        types[static_cast<std::size_t>(item.input)] = item.type;
        DataType output{};
        CHECK(build(*linear()).getOutputDataTypes(&output, 1, types.data(), 7) != 0);
        CHECK_EQUAL(bench.said(), item.said);
    }
}

void experts_of_a_partition_must_be_int32() {
    Bench bench;
    const DataType input = DataType::kINT64;
    DataType outputs[2]{};
    CHECK(build(*partition()).getOutputDataTypes(outputs, 2, &input, 1) != 0);
    CHECK_EQUAL(bench.said(), "vlmdeploy RoutedPartition: experts is INT64, expected INT32");
}

void number_of_inputs_is_checked() {
    Bench bench;
    DataType output{};
    CHECK(build(*linear()).getOutputDataTypes(&output, 1, kLinearTypes.data(), 6) != 0);
    CHECK_CONTAINS(bench.said(), "there are 6 inputs and 1 outputs, expected 7 and 1");
}

void output_shape_of_a_linear_is_tokens_by_out() {
    Bench bench;
    CHECK(inferred(*linear(), kLinearSizes, 1) == (std::vector<Sizes>{{kAny, 96}}));
    std::vector<Sizes> fixed = kLinearSizes;
    fixed[0][0] = fixed[1][0] = fixed[2][0] = 5;
    CHECK(inferred(*linear(), fixed, 1) == (std::vector<Sizes>{{5, 96}}));
}

void output_shapes_of_a_partition_are_tokens_and_one() {
    Bench bench;
    CHECK(inferred(*partition(), {{kAny}}, 2) == (std::vector<Sizes>{{kAny}, {1}}));
}

void shapes_that_do_not_fit_are_named() {
    const struct {
        int input;
        Sizes sizes;
        const char* said;
    } cases[] = {
        {0, {kAny, 200}, "in of x is 200, expected a multiple of group_size 128"},
        {0, {kAny, 0}, "in of x is 0, expected a multiple of group_size 128"},
        {0, {1, kAny, 256}, "x is [1, ?, 256], expected [?, ?]: tokens, in"},
        {1, {kAny, 1}, "experts is [?, 1], expected [?]: tokens of x"},
        {3, {2}, "language_count is [2], expected [1]"},
        {4, {2, 96, 256}, "codes is [2, 96, 256], expected [2, ?, 128]: experts, out, half of in"},
        {4, {1, 96, 128}, "codes is [1, 96, 128], expected [2, ?, 128]"},
        {4, {2, 0, 128}, "out of codes is 0, expected at least 1"},
        {5, {2, 4, 96}, "scales is [2, 4, 96], expected [2, 2, 96]: experts, in / group_size, out"},
        {5, {2, 96, 2}, "scales is [2, 96, 2], expected [2, 2, 96]"},
        {6, {96}, "bias is [96], expected [2, 96]: experts, out"},
    };
    for (const auto& item : cases) {
        Bench bench;
        std::vector<Sizes> sizes = kLinearSizes;
        sizes[static_cast<std::size_t>(item.input)] = item.sizes;
        CHECK(inferred(*linear(), sizes, 1).empty());
        CHECK_CONTAINS(bench.said(), item.said);
    }
}

void shape_inputs_are_refused() {
    Bench bench;
    Builder builder;
    DimsExprs input{};
    input.nbDims = 1;
    input.d[0] = builder.constant(4);
    DimsExprs outputs[2]{};
    CHECK(build(*partition()).getOutputShapes(&input, 1, &input, 1, outputs, 2, builder) != 0);
    CHECK_CONTAINS(bench.said(), "there are 1 shape inputs, expected none");
}

void only_linear_formats_of_the_right_types_are_supported() {
    Bench bench;
    const auto plugin = linear();
    const auto good = dynamic(linear_tensors(4));
    for (int position = 0; position < 8; ++position) {
        const auto index = static_cast<std::size_t>(position);
        CHECK(build(*plugin).supportsFormatCombination(position, good.data(), 7, 1));
        auto other = good;
        other[index].desc.format = TensorFormat::kCHW32;
        CHECK(!build(*plugin).supportsFormatCombination(position, other.data(), 7, 1));
        other = good;
        other[index].desc.type = DataType::kBOOL;
        CHECK(!build(*plugin).supportsFormatCombination(position, other.data(), 7, 1));
    }
    CHECK(!build(*plugin).supportsFormatCombination(8, good.data(), 7, 1));
    CHECK(!build(*plugin).supportsFormatCombination(-1, good.data(), 7, 1));
}

void output_format_follows_x_and_not_its_own_choice() {
    Bench bench;
    auto mixed = dynamic(linear_tensors(4));
    mixed[0].desc.type = DataType::kBF16;  // the output still says HALF
    CHECK(build(*linear()).supportsFormatCombination(0, mixed.data(), 7, 1));
    CHECK(!build(*linear()).supportsFormatCombination(7, mixed.data(), 7, 1));
}

void formats_of_a_partition_are_linear_int32() {
    Bench bench;
    auto all = dynamic(tensors({{4}, {4}, {1}}, {DataType::kINT32, DataType::kINT32, DataType::kINT64}));
    CHECK(build(*partition()).supportsFormatCombination(0, all.data(), 1, 2));
    CHECK(build(*partition()).supportsFormatCombination(1, all.data(), 1, 2));
    CHECK(!build(*partition()).supportsFormatCombination(2, all.data(), 1, 2));
}

void stored_fields_make_the_same_plugin_again() {
    Bench bench;
    for (const std::int32_t group_size : {32, 64, 128}) {
        const auto plugin = linear(group_size);
        const PluginFieldCollection* stored = runtime(*plugin).getFieldsToSerialize();
        CHECK_EQUAL(stored->nbFields, 2);
        const std::unique_ptr<IPluginV3> again(creator(kLinear).createPlugin("again", stored, TensorRTPhase::kRUNTIME));
        CHECK(again != nullptr);
        const PluginFieldCollection* twice = runtime(*again).getFieldsToSerialize();
        CHECK_EQUAL(std::string(twice->fields[0].name), "format");
        CHECK_EQUAL(*static_cast<const std::int32_t*>(twice->fields[0].data), 1);
        CHECK_EQUAL(std::string(twice->fields[1].name), "group_size");
        CHECK_EQUAL(*static_cast<const std::int32_t*>(twice->fields[1].data), group_size);
    }
    const auto other = partition();
    CHECK_EQUAL(runtime(*other).getFieldsToSerialize()->nbFields, 1);
}

void plan_of_a_newer_format_is_refused() {
    Bench bench;
    const std::int32_t format = 2;
    const std::int32_t group_size = 128;
    const std::vector<PluginField> fields = {{"format", &format, PluginFieldType::kINT32, 1},
                                             {"group_size", &group_size, PluginFieldType::kINT32, 1}};
    CHECK(create(kLinear, fields, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK_EQUAL(bench.said(),
                "vlmdeploy RoutedLinear: layer_7: the plan stores format 2, expected 1: use the newer "
                "plugin library that it was built with");
}

void plan_without_a_format_is_refused() {
    Bench bench;
    CHECK(create(kPartition, {}, TensorRTPhase::kRUNTIME, "") == nullptr);
    CHECK_EQUAL(bench.said(), "vlmdeploy RoutedPartition: the plan stores no format, expected 1");
}

void group_size_must_be_one_of_three() {
    for (const std::int32_t group_size : {-128, 0, 16, 48, 256}) {
        Bench bench;
        CHECK(linear(group_size) == nullptr);
        CHECK_EQUAL(bench.said(), "vlmdeploy RoutedLinear: layer_7: group_size is " + std::to_string(group_size) +
                                      ", expected 32, 64 or 128");
    }
}

void group_size_may_be_wide_and_must_be_one_integer() {
    Bench bench;
    const std::int64_t wide[] = {64, 64};
    CHECK(create(kLinear, {{"group_size", wide, PluginFieldType::kINT64, 1}}, TensorRTPhase::kBUILD) != nullptr);
    CHECK(create(kLinear, {{"group_size", wide, PluginFieldType::kINT64, 2}}, TensorRTPhase::kBUILD) == nullptr);
    CHECK_CONTAINS(bench.logger.lines.back(), "group_size has 2 values, expected 1");
    CHECK(create(kLinear, {{"group_size", nullptr, PluginFieldType::kINT32, 1}}, TensorRTPhase::kBUILD) == nullptr);
    const float number = 128.0F;
    CHECK(create(kLinear, {{"group_size", &number, PluginFieldType::kFLOAT32, 1}}, TensorRTPhase::kBUILD) == nullptr);
    CHECK_CONTAINS(bench.logger.lines.back(), "group_size is a field of type 1, expected an integer");
}

void missing_group_size_is_told_and_other_fields_are_not_ours() {
    Bench bench;
    const std::int32_t other = 3;
    CHECK(create(kLinear, {{"other", &other, PluginFieldType::kINT32, 1}}, TensorRTPhase::kBUILD) == nullptr);
    CHECK_CONTAINS(bench.said(), "there is no attribute group_size");
    CHECK(std::unique_ptr<IPluginV3>(creator(kPartition).createPlugin(nullptr, nullptr, TensorRTPhase::kBUILD)) !=
          nullptr);
}

void enqueue_passes_what_tensorrt_gives() {
    Bench bench;
    const auto plugin = linear();
    const auto all = linear_tensors(65);
    const void* inputs[7];
    for (std::uintptr_t index = 0; index < 7; ++index) {
        inputs[index] = reinterpret_cast<const void*>(0x100 + 16 * index);
    }
    void* output = reinterpret_cast<void*>(0x200);
    auto* stream = reinterpret_cast<cudaStream_t>(0x77);
    CHECK_EQUAL(runtime(*plugin).onShapeChange(all.data(), 7, all.data() + 7, 1), 0);
    CHECK_EQUAL(runtime(*plugin).enqueue(all.data(), all.data() + 7, inputs, &output, nullptr, stream), 0);
    const fake::Launch& launch = bench.state.launches.at(0);
    CHECK_EQUAL(launch.symbol, "large_fp16");
    CHECK_EQUAL(launch.stream, static_cast<void*>(stream));
    const std::vector<std::uint64_t> expected = {0x100, 0x110, 0x120, 0x130, 0x140, 0x150, 0x160, 65, 96, 2, 0x200};
    CHECK(launch.arguments == expected);
}

void enqueue_takes_the_kernels_of_the_type_of_x() {
    Bench bench;
    auto all = linear_tensors(1);
    all[0].type = all[7].type = DataType::kBF16;
    void* const addresses[7] = {reinterpret_cast<void*>(16), reinterpret_cast<void*>(16), reinterpret_cast<void*>(16),
                                reinterpret_cast<void*>(16), reinterpret_cast<void*>(16), reinterpret_cast<void*>(16),
                                reinterpret_cast<void*>(16)};
    CHECK_EQUAL(runtime(*linear()).enqueue(all.data(), all.data() + 7, addresses, addresses, nullptr, nullptr), 0);
    CHECK_EQUAL(bench.state.launches.at(0).symbol, "gemv_bf16");
}

void partition_is_enqueued_with_its_number_of_tokens() {
    Bench bench;
    const auto all = tensors({{9}, {9}, {1}}, {DataType::kINT32, DataType::kINT32, DataType::kINT32});
    const void* input = reinterpret_cast<const void*>(0x100);
    void* outputs[2] = {reinterpret_cast<void*>(0x110), reinterpret_cast<void*>(0x120)};
    CHECK_EQUAL(runtime(*partition()).enqueue(all.data(), all.data() + 1, &input, outputs, nullptr, nullptr), 0);
    CHECK(bench.state.launches.at(0).arguments == (std::vector<std::uint64_t>{0x100, 9, 0x110, 0x120}));
}

void failed_launch_is_a_status_and_a_line() {
    Bench bench;
    bench.state.failing = "launch_kernel";
    const auto all = linear_tensors(1);
    void* const addresses[7] = {reinterpret_cast<void*>(16), reinterpret_cast<void*>(16), reinterpret_cast<void*>(16),
                                reinterpret_cast<void*>(16), reinterpret_cast<void*>(16), reinterpret_cast<void*>(16),
                                reinterpret_cast<void*>(16)};
    CHECK(runtime(*linear()).enqueue(all.data(), all.data() + 7, addresses, addresses, nullptr, nullptr) != 0);
    CHECK_CONTAINS(bench.said(),
                   "launching routed_gemv.fp16.g128 failed: no kernel image is available (CUDA error 209)");
}

void gpu_without_kernels_fails_the_build_and_the_run() {
    Bench bench;
    bench.state.major = 7;
    bench.state.minor = 5;
    const auto all = linear_tensors(4);
    const auto ranges = dynamic(all);
    CHECK(build(*linear()).configurePlugin(ranges.data(), 7, ranges.data() + 7, 1) != 0);
    CHECK_EQUAL(bench.said(), "vlmdeploy RoutedLinear: no kernel for SM 75: built for 80, 87");
    CHECK(runtime(*linear()).onShapeChange(all.data(), 7, all.data() + 7, 1) != 0);
    const auto sizes = tensors({{4}, {4}, {1}}, {DataType::kINT32, DataType::kINT32, DataType::kINT32});
    CHECK(runtime(*partition()).onShapeChange(sizes.data(), 1, sizes.data() + 1, 2) != 0);
    CHECK_EQUAL(bench.logger.lines.size(), 3u);
}

void shapes_are_checked_again_when_they_are_known() {
    Bench bench;
    auto all = linear_tensors(4);
    all[1].dims.d[0] = 5;
    CHECK(runtime(*linear()).onShapeChange(all.data(), 7, all.data() + 7, 1) != 0);
    CHECK_CONTAINS(bench.said(), "experts is [5], expected [4]: tokens of x");
}

void errors_go_to_stderr_where_there_is_no_logger() {
    Bench bench;
    bench.finder.logger = nullptr;
    CHECK(linear(7) == nullptr);
    setLoggerFinder(nullptr);
    CHECK(linear(7) == nullptr);
    CHECK_EQUAL(bench.logger.lines.size(), 0u);
}

void info_is_the_json_that_python_reads() {
    Bench bench;
    const std::string version = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR);
    CHECK_EQUAL(std::string(vlmdeploy_plugin_info()),
                "{\"plugin_version\": \"1\", \"packing\": 1, \"tensorrt\": \"" + version +
                    "\", \"tensorrt_major\": " + std::to_string(NV_TENSORRT_MAJOR) + ", \"architectures\": [80, 87]}");
}

}  // namespace

namespace vlmdeploy {

Launcher& process_launcher() {
    return *fake::current_launcher;
}

}  // namespace vlmdeploy

int main() {
    return checks::run_all({
        TEST(creators_bear_the_names_of_the_graph),
        TEST(plugin_bears_the_name_of_its_creator_and_its_clone_too),
        TEST(output_of_a_linear_has_the_type_of_x),
        TEST(outputs_of_a_partition_are_int32),
        TEST(types_that_no_kernel_takes_are_named),
        TEST(experts_of_a_partition_must_be_int32),
        TEST(number_of_inputs_is_checked),
        TEST(output_shape_of_a_linear_is_tokens_by_out),
        TEST(output_shapes_of_a_partition_are_tokens_and_one),
        TEST(shapes_that_do_not_fit_are_named),
        TEST(shape_inputs_are_refused),
        TEST(only_linear_formats_of_the_right_types_are_supported),
        TEST(output_format_follows_x_and_not_its_own_choice),
        TEST(formats_of_a_partition_are_linear_int32),
        TEST(stored_fields_make_the_same_plugin_again),
        TEST(plan_of_a_newer_format_is_refused),
        TEST(plan_without_a_format_is_refused),
        TEST(group_size_must_be_one_of_three),
        TEST(group_size_may_be_wide_and_must_be_one_integer),
        TEST(missing_group_size_is_told_and_other_fields_are_not_ours),
        TEST(enqueue_passes_what_tensorrt_gives),
        TEST(enqueue_takes_the_kernels_of_the_type_of_x),
        TEST(partition_is_enqueued_with_its_number_of_tokens),
        TEST(failed_launch_is_a_status_and_a_line),
        TEST(gpu_without_kernels_fails_the_build_and_the_run),
        TEST(shapes_are_checked_again_when_they_are_known),
        TEST(errors_go_to_stderr_where_there_is_no_logger),
        TEST(info_is_the_json_that_python_reads),
    });
}
