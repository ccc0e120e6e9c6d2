// Which shapes and types fit the two operations, and each other. Plain C++: a size of -1 is not known yet, and fits.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "status.h"

namespace vlmdeploy {

struct Shape {
    static constexpr int kMostAxes = 8;

    int num_axes = 0;
    std::array<std::int64_t, kMostAxes> size{};
};

constexpr std::int64_t kUnknown = -1;

// Inputs of RoutedLinear, in order.
enum LinearInput { kX, kExperts, kOrder, kLanguageCount, kCodes, kScales, kBias, kNumLinearInputs };

constexpr const char* kLinearInputs[kNumLinearInputs] = {"x",     "experts", "order", "language_count",
                                                         "codes", "scales",  "bias"};

bool is_group_size(std::int64_t value);

// Shapes of the inputs of RoutedLinear against the group size and each other.
Status check_linear_shapes(const std::vector<Shape>& inputs, int group_size);

// The shape of the input of RoutedPartition: [tokens].
Status check_partition_shapes(const std::vector<Shape>& inputs);

}  // namespace vlmdeploy
