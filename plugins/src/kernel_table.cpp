#include "kernel_table.h"

#include <set>

namespace vlmdeploy {

std::vector<int> architectures(const KernelTable& table) {
    std::set<int> found;
    for (std::size_t index = 0; index < table.num_kernels; ++index) {
        found.insert(table.kernels[index].architecture);
    }
    return {found.begin(), found.end()};
}

std::string architecture_list(const KernelTable& table, const char* separator) {
    std::string text;
    for (const int architecture : architectures(table)) {
        text += (text.empty() ? "" : separator) + std::to_string(architecture);
    }
    return text;
}

const char* activation_name(Activation activation) {
    switch (activation) {
        case Activation::fp16: return "fp16";
        case Activation::bf16: return "bf16";
        case Activation::none: break;
    }
    return "no";
}

const Kernel* find_partition(const KernelTable& table, int architecture) {
    for (std::size_t index = 0; index < table.num_kernels; ++index) {
        const Kernel& kernel = table.kernels[index];
        if (kernel.architecture == architecture && kernel.kind == Kind::partition) {
            return &kernel;
        }
    }
    return nullptr;
}

std::vector<const Kernel*> find_linears(const KernelTable& table, int architecture, Activation activation,
                                        int group_size) {
    const Kernel* gemv = nullptr;
    const Kernel* small = nullptr;
    const Kernel* large = nullptr;
    for (std::size_t index = 0; index < table.num_kernels; ++index) {
        const Kernel& kernel = table.kernels[index];
        if (kernel.architecture != architecture || kernel.activation != activation || kernel.group_size != group_size) {
            continue;
        }
        if (kernel.kind == Kind::gemv) {
            gemv = &kernel;
        } else if (kernel.kind == Kind::gemm) {
            small = small == nullptr || kernel.block_rows < small->block_rows ? &kernel : small;
            large = large == nullptr || kernel.block_rows > large->block_rows ? &kernel : large;
        }
    }
    if (gemv == nullptr || small == nullptr) {
        return {};
    }
    return {gemv, small, large};
}

const Kernel* find_linear(const KernelTable& table, int architecture, Activation activation, int group_size,
                          long long tokens) {
    const std::vector<const Kernel*> found = find_linears(table, architecture, activation, group_size);
    for (std::size_t index = 0; index < table.num_choices && !found.empty(); ++index) {
        const Choice& choice = table.choices[index];
        if (choice.architecture == architecture) {
            return found[tokens <= choice.gemv_up_to_tokens ? 0 : tokens <= choice.small_gemm_up_to_tokens ? 1 : 2];
        }
    }
    return nullptr;
}

}  // namespace vlmdeploy
