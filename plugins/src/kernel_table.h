// The compiled kernels that are part of the library, and which of them serves how many tokens.
//
// embed_kernels.py writes one source file that defines embedded_kernels(); tests define tables of their own.

#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace vlmdeploy {

enum class Kind { partition, gemv, gemm };
enum class Activation { none, fp16, bf16 };

struct Kernel {
    const char* name;  // "routed_gemm.fp16.g128.64x64"
    int architecture;  // 87: compute capability 8.7; the image runs on no other
    Kind kind;
    Activation activation;  // none for a partition
    int group_size;         // 0 for a partition
    int block_rows;         // 1 for a gemv
    int block_columns;
    int num_warps;
    int shared_bytes;       // dynamic shared memory of one block
    const char* symbol;     // the function inside the image
    const void* image;      // a cubin
    std::size_t num_bytes;  // of the image
};

// Up to gemv_up_to_tokens the gemv serves, up to small_gemm_up_to_tokens the gemm with the fewest rows in a block,
// above that the one with the most.
struct Choice {
    int architecture;
    int gemv_up_to_tokens;
    int small_gemm_up_to_tokens;
};

struct KernelTable {
    const Kernel* kernels;
    std::size_t num_kernels;
    const Choice* choices;
    std::size_t num_choices;
    int packing;  // version of the layout of codes, scales and bias that the kernels read
};

// The architectures that there are kernels for, ascending.
std::vector<int> architectures(const KernelTable& table);

// The same as text: "80, 86, 87".
std::string architecture_list(const KernelTable& table, const char* separator = ", ");

const char* activation_name(Activation activation);

// The partition kernel of an architecture; null where there is none.
const Kernel* find_partition(const KernelTable& table, int architecture);

// The kernel for a number of tokens; null where there is none for this architecture, activation and group size.
const Kernel* find_linear(const KernelTable& table, int architecture, Activation activation, int group_size,
                          long long tokens);

// Every kernel that find_linear can return, over all numbers of tokens.
std::vector<const Kernel*> find_linears(const KernelTable& table, int architecture, Activation activation,
                                        int group_size);

// Defined by the generated source.
const KernelTable& embedded_kernels();

}  // namespace vlmdeploy
