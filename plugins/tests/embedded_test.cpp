// Prints the embedded table, a kernel a line with its image in hexadecimal, and which kernel serves how many tokens,
// for a test to compare with what was embedded.

#include <cstdio>

#include "kernel_table.h"

int main() {
    const vlmdeploy::KernelTable& table = vlmdeploy::embedded_kernels();
    for (std::size_t index = 0; index < table.num_kernels; ++index) {
        const vlmdeploy::Kernel& kernel = table.kernels[index];
        std::printf("kernel %s %d %d %s %d %d %d %d %d %s ", kernel.name, kernel.architecture,
                    static_cast<int>(kernel.kind), vlmdeploy::activation_name(kernel.activation), kernel.group_size,
                    kernel.block_rows, kernel.block_columns, kernel.num_warps, kernel.shared_bytes, kernel.symbol);
        for (std::size_t byte = 0; byte < kernel.num_bytes; ++byte) {
            std::printf("%02x", static_cast<const unsigned char*>(kernel.image)[byte]);
        }
        std::printf("\n");
    }
    for (std::size_t index = 0; index < table.num_choices; ++index) {
        std::printf("choice %d %d %d\n", table.choices[index].architecture, table.choices[index].gemv_up_to_tokens,
                    table.choices[index].small_gemm_up_to_tokens);
    }
    std::printf("packing %d\n", table.packing);
    for (const int architecture : vlmdeploy::architectures(table)) {
        for (const auto activation : {vlmdeploy::Activation::fp16, vlmdeploy::Activation::bf16}) {
            for (const int group_size : {32, 64, 128}) {
                for (const long long tokens : {1, 2, 3, 80, 81, 512}) {
                    std::printf("serves %d %s %d %lld %s\n", architecture, vlmdeploy::activation_name(activation),
                                group_size, tokens,
                                vlmdeploy::find_linear(table, architecture, activation, group_size, tokens)->name);
                }
            }
        }
    }
    return 0;
}
