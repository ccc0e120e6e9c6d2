#include "shapes.h"

namespace vlmdeploy {
namespace {

constexpr std::int64_t kNumExperts = 2;

std::string text_of(const Shape& shape) {
    std::string text = "[";
    for (int axis = 0; axis < shape.num_axes; ++axis) {
        text += axis == 0 ? "" : ", ";
        text += shape.size[axis] == kUnknown ? "?" : std::to_string(shape.size[axis]);
    }
    return text + "]";
}

// Every axis as expected, where both are known.
Status expect(const char* name, const Shape& found, const std::vector<std::int64_t>& sizes, const char* legend) {
    Shape wanted;
    wanted.num_axes = static_cast<int>(sizes.size());
    bool fits = found.num_axes == wanted.num_axes;
    for (int axis = 0; axis < wanted.num_axes; ++axis) {
        wanted.size[axis] = sizes[axis];
        const bool is_known = fits && found.size[axis] != kUnknown && sizes[axis] != kUnknown;
        fits = fits && (!is_known || found.size[axis] == sizes[axis]);
    }
    return fits
               ? Status{}
               : failure(std::string(name) + " is " + text_of(found) + ", expected " + text_of(wanted) + ": " + legend);
}

std::int64_t size_of(const Shape& shape, int axis) {
    return axis < shape.num_axes ? shape.size[axis] : kUnknown;
}

// What each input must be, given what x, codes and scales say about tokens, in and out.
Status check_against_each_other(const std::vector<Shape>& inputs, int group_size) {
    const std::int64_t tokens = size_of(inputs[kX], 0);
    const std::int64_t in = size_of(inputs[kX], 1);
    const std::int64_t out = size_of(inputs[kCodes], 1);
    const std::int64_t groups = in == kUnknown ? kUnknown : in / group_size;
    const std::int64_t bytes = in == kUnknown ? kUnknown : in / 2;
    const struct {
        LinearInput input;
        std::vector<std::int64_t> sizes;
        const char* legend;
    } rules[] = {
        {kX, {kUnknown, kUnknown}, "tokens, in"},
        {kExperts, {tokens}, "tokens of x"},
        {kOrder, {tokens}, "tokens of x"},
        {kLanguageCount, {1}, "one number"},
        {kCodes, {kNumExperts, kUnknown, bytes}, "experts, out, half of in"},
        {kScales, {kNumExperts, groups, out}, "experts, in / group_size, out"},
        {kBias, {kNumExperts, out}, "experts, out"},
    };
    for (const auto& rule : rules) {
        const Status status = expect(kLinearInputs[rule.input], inputs[rule.input], rule.sizes, rule.legend);
        if (!status.ok()) {
            return status;
        }
    }
    return {};
}

}  // namespace

bool is_group_size(std::int64_t value) {
    return value == 32 || value == 64 || value == 128;
}

Status check_linear_shapes(const std::vector<Shape>& inputs, int group_size) {
    if (inputs.size() != kNumLinearInputs) {
        return failure("there are " + std::to_string(inputs.size()) + " inputs, expected " +
                       std::to_string(kNumLinearInputs) + ": x, experts, order, language_count, codes, scales, bias");
    }
    if (!is_group_size(group_size)) {
        return failure("group_size is " + std::to_string(group_size) + ", expected 32, 64 or 128");
    }
    const std::int64_t in = size_of(inputs[kX], 1);
    if (in != kUnknown && (in < group_size || in % group_size != 0)) {
        return failure("in of x is " + std::to_string(in) + ", expected a multiple of group_size " +
                       std::to_string(group_size));
    }
    if (size_of(inputs[kCodes], 1) == 0) {
        return failure("out of codes is 0, expected at least 1");
    }
    return check_against_each_other(inputs, group_size);
}

Status check_partition_shapes(const std::vector<Shape>& inputs) {
    if (inputs.size() != 1) {
        return failure("there are " + std::to_string(inputs.size()) + " inputs, expected 1: experts");
    }
    return expect("experts", inputs[0], {kUnknown}, "tokens");
}

}  // namespace vlmdeploy
