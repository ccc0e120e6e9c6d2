// Contract of the launcher: which kernel, which grid, which arguments, and one line where it cannot be. No GPU.

#include "launcher.h"

#include <set>
#include <thread>

#include "checks.h"
#include "fake_driver.h"

namespace {

using vlmdeploy::Activation;
using vlmdeploy::Launcher;
using vlmdeploy::LinearCall;
using vlmdeploy::PartitionCall;
using vlmdeploy::Status;

// A fresh driver and launcher.
struct Bench {
    Bench() { fake::state = &state; }

    fake::State state;
    Launcher launcher{fake::table, fake::find_driver};
};

void* address(std::uintptr_t value) {
    return reinterpret_cast<void*>(value);
}

void* const kStream = address(0x77);

LinearCall linear_call(std::int64_t tokens, Activation activation = Activation::fp16, std::int64_t out_width = 100) {
    return {activation,     128,
            address(0x100), address(0x110),
            address(0x120), address(0x130),
            address(0x140), address(0x150),
            address(0x160), tokens,
            out_width,      3,
            address(0x170)};
}

std::string symbol_for(std::int64_t tokens, Activation activation = Activation::fp16) {
    Bench bench;
    const Status status = bench.launcher.linear(linear_call(tokens, activation), kStream);
    return status.ok() && bench.state.launches.size() == 1 ? bench.state.launches[0].symbol : status.message;
}

void kernel_is_chosen_by_number_of_tokens() {
    CHECK_EQUAL(symbol_for(1), "gemv_fp16");
    CHECK_EQUAL(symbol_for(2), "gemv_fp16");
    CHECK_EQUAL(symbol_for(3), "small_fp16");
    CHECK_EQUAL(symbol_for(64), "small_fp16");
    CHECK_EQUAL(symbol_for(65), "large_fp16");
    CHECK_EQUAL(symbol_for(1 << 20), "large_fp16");
}

void kernel_is_chosen_by_activation() {
    CHECK_EQUAL(symbol_for(1, Activation::bf16), "gemv_bf16");
    CHECK_EQUAL(symbol_for(100, Activation::bf16), "large_bf16");
}

void gemv_has_a_row_of_blocks_for_each_token() {
    Bench bench;
    CHECK(bench.launcher.linear(linear_call(2), kStream).ok());
    const fake::Launch& launch = bench.state.launches.at(0);
    CHECK_EQUAL(launch.grid_x, 4u);  // 100 / 32, rounded up
    CHECK_EQUAL(launch.grid_y, 2u);
    CHECK_EQUAL(launch.grid_z, 1u);
    CHECK_EQUAL(launch.block_x, 64u);  // 2 warps
    CHECK_EQUAL(launch.block_y * launch.block_z, 1u);
    CHECK_EQUAL(launch.shared_bytes, 512u);
    CHECK_EQUAL(launch.stream, kStream);
}

void gemm_has_one_block_of_rows_more_than_the_tokens_fill() {
    const struct {
        std::int64_t tokens;
        unsigned grid_y;
    } cases[] = {{3, 2}, {16, 2}, {17, 3}, {64, 5}, {65, 3}, {128, 3}, {129, 4}};
    for (const auto& item : cases) {
        Bench bench;
        CHECK(bench.launcher.linear(linear_call(item.tokens), kStream).ok());
        CHECK_EQUAL(bench.state.launches.at(0).grid_x, 2u);  // 100 / 64, rounded up
        CHECK_EQUAL(bench.state.launches.at(0).grid_y, item.grid_y);
    }
}

void arguments_of_a_linear_are_inputs_then_sizes_then_output() {
    Bench bench;
    CHECK(bench.launcher.linear(linear_call(5), kStream).ok());
    const std::vector<std::uint64_t> expected = {0x100, 0x110, 0x120, 0x130, 0x140, 0x150, 0x160, 5, 100, 3, 0x170};
    CHECK(bench.state.launches.at(0).arguments == expected);
}

void arguments_of_a_partition_are_inputs_then_sizes_then_outputs() {
    Bench bench;
    CHECK(bench.launcher.partition({address(0x100), 9, address(0x110), address(0x120)}, kStream).ok());
    const fake::Launch& launch = bench.state.launches.at(0);
    CHECK_EQUAL(launch.symbol, "partition_87");
    CHECK(launch.arguments == (std::vector<std::uint64_t>{0x100, 9, 0x110, 0x120}));
    CHECK_EQUAL(launch.grid_x * launch.grid_y * launch.grid_z, 1u);
    CHECK_EQUAL(launch.block_x, 128u);
}

void shared_memory_above_48_kib_is_asked_for_once() {
    Bench bench;
    for (int repeat = 0; repeat < 3; ++repeat) {
        CHECK(bench.launcher.linear(linear_call(64), kStream).ok());  // 48 KiB exactly
        CHECK(bench.launcher.linear(linear_call(65), kStream).ok());  // 64 KiB
    }
    CHECK_EQUAL(bench.state.shared_requests.size(), 1u);
    CHECK_EQUAL(bench.state.shared_requests.at(0).symbol, "large_fp16");
    CHECK_EQUAL(bench.state.shared_requests.at(0).attribute, 8);
    CHECK_EQUAL(bench.state.shared_requests.at(0).value, 65536);
}

void image_is_loaded_once_for_a_context() {
    Bench bench;
    for (int repeat = 0; repeat < 3; ++repeat) {
        CHECK(bench.launcher.linear(linear_call(1), kStream).ok());
    }
    CHECK_EQUAL(bench.state.loaded_images.size(), 1u);
    bench.state.context_id = 2;  // another context, even at the same address
    CHECK(bench.launcher.linear(linear_call(1), kStream).ok());
    CHECK_EQUAL(bench.state.loaded_images.size(), 2u);
}

void prepare_loads_what_any_number_of_tokens_needs() {
    Bench bench;
    CHECK(bench.launcher.prepare_linear(Activation::fp16, 128).ok());
    CHECK(bench.launcher.prepare_partition().ok());
    CHECK_EQUAL(bench.state.loaded_images.size(), 4u);
    for (const std::int64_t tokens : {1, 3, 65}) {
        CHECK(bench.launcher.linear(linear_call(tokens), kStream).ok());
    }
    CHECK_EQUAL(bench.state.loaded_images.size(), 4u);
}

void without_tokens_nothing_is_launched() {
    Bench bench;
    bench.state.context = nullptr;  // and nothing is asked either
    LinearCall call = linear_call(0);
    call.x = call.experts = call.order = call.y = nullptr;
    CHECK(bench.launcher.linear(call, kStream).ok());
    CHECK(bench.launcher.partition({nullptr, 0, nullptr, address(0x120)}, kStream).ok());
    CHECK_EQUAL(bench.state.launches.size() + bench.state.loaded_images.size(), 0u);
}

void gpu_without_kernels_is_told_which_there_are() {
    Bench bench;
    bench.state.major = 7;
    bench.state.minor = 5;
    CHECK_EQUAL(bench.launcher.linear(linear_call(1), kStream).message, "no kernel for SM 75: built for 80, 87");
    CHECK_EQUAL(bench.launcher.prepare_linear(Activation::fp16, 128).message, "no kernel for SM 75: built for 80, 87");
    CHECK_EQUAL(bench.launcher.prepare_partition().message, "no kernel for SM 75: built for 80, 87");
    CHECK_EQUAL(bench.state.launches.size(), 0u);
}

void newer_gpu_of_two_digits_is_named_in_full() {
    Bench bench;
    bench.state.major = 12;
    bench.state.minor = 1;
    CHECK_CONTAINS(bench.launcher.prepare_partition().message, "no kernel for SM 121:");
}

void group_size_without_kernels_is_named() {
    Bench bench;
    LinearCall call = linear_call(1);
    call.group_size = 64;
    const std::string expected =
        "no kernel of a linear with fp16 activations and group_size 64 for SM 87 in this library";
    CHECK_EQUAL(bench.launcher.linear(call, kStream).message, expected);
}

void driver_errors_say_what_was_done_and_why_it_failed() {
    const struct {
        const char* failing;
        const char* said;
    } cases[] = {
        {"ctx_get_current", "asking for the CUDA context failed: no kernel image is available (CUDA error 209)"},
        {"ctx_get_id", "asking for the id of the CUDA context failed"},
        {"ctx_get_device", "asking for the GPU of the CUDA context failed"},
        {"device_get_attribute", "asking for the GPU's kind failed"},
        {"module_load_data", "loading routed_gemm.fp16.g128.64x64 for SM 87 failed: no kernel image is available"},
        {"module_get_function", "finding large_fp16 in routed_gemm.fp16.g128.64x64 for SM 87 failed"},
        {"func_set_attribute", "asking for 65536 bytes of shared memory for routed_gemm.fp16.g128.64x64"},
        {"launch_kernel", "launching routed_gemm.fp16.g128.64x64 failed"},
    };
    for (const auto& item : cases) {
        Bench bench;
        bench.state.failing = item.failing;
        CHECK_CONTAINS(bench.launcher.linear(linear_call(65), kStream).message, item.said);
        bench.state.failing = "";
        CHECK(bench.launcher.linear(linear_call(65), kStream).ok());  // and nothing of it is remembered
    }
}

void missing_driver_is_said_and_asked_for_again() {
    int num_asked = 0;
    Launcher launcher(fake::table, [&num_asked](std::string& problem) {
        problem = "no CUDA driver: libcuda.so.1 is not there";
        ++num_asked;
        return static_cast<const vlmdeploy::CudaDriver*>(nullptr);
    });
    CHECK_EQUAL(launcher.prepare_partition().message, "no CUDA driver: libcuda.so.1 is not there");
    CHECK_EQUAL(launcher.linear(linear_call(1), kStream).message, "no CUDA driver: libcuda.so.1 is not there");
    CHECK_EQUAL(num_asked, 2);
}

void thread_without_a_context_is_told() {
    Bench bench;
    bench.state.context = nullptr;
    CHECK_CONTAINS(bench.launcher.linear(linear_call(1), kStream).message, "this thread has no CUDA context");
}

void sizes_that_a_kernel_cannot_take_are_refused() {
    Bench bench;
    CHECK_CONTAINS(bench.launcher.linear(linear_call(-1), kStream).message, "tokens is -1, expected 1 to 2147483647");
    CHECK_CONTAINS(bench.launcher.linear(linear_call(1LL << 31), kStream).message, "tokens is 2147483648");
    CHECK_CONTAINS(bench.launcher.linear(linear_call(1, Activation::fp16, 0), kStream).message, "out is 0");
    CHECK_CONTAINS(bench.launcher.linear(linear_call(64 * 65535), kStream).message,
                   "routed_gemm.fp16.g128.64x64: a grid of 2 x 65536 blocks is more than a GPU takes");
    CHECK_EQUAL(bench.state.launches.size(), 0u);
}

void pointers_must_be_there_and_aligned() {
    Bench bench;
    LinearCall call = linear_call(1);
    call.scales = address(0x158);
    CHECK_EQUAL(bench.launcher.linear(call, kStream).message, "scales is not aligned to 16 bytes");
    call.scales = nullptr;
    CHECK_EQUAL(bench.launcher.linear(call, kStream).message, "scales is a null pointer");
    const PartitionCall partition{address(0x100), 1, nullptr, address(0x120)};
    CHECK_EQUAL(bench.launcher.partition(partition, kStream).message, "order is a null pointer");
}

void threads_share_one_load_of_each_image() {
    Bench bench;
    std::vector<std::thread> threads;
    for (int index = 0; index < 2; ++index) {
        threads.emplace_back([&bench] {
            for (int repeat = 0; repeat < 200; ++repeat) {
                CHECK(bench.launcher.linear(linear_call(1 + repeat % 100), kStream).ok());
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    const std::set<const void*> images(bench.state.loaded_images.begin(), bench.state.loaded_images.end());
    CHECK_EQUAL(bench.state.loaded_images.size(), 3u);
    CHECK_EQUAL(images.size(), 3u);
    CHECK_EQUAL(bench.state.launches.size(), 400u);
}

}  // namespace

int main() {
    return checks::run_all({
        TEST(kernel_is_chosen_by_number_of_tokens),
        TEST(kernel_is_chosen_by_activation),
        TEST(gemv_has_a_row_of_blocks_for_each_token),
        TEST(gemm_has_one_block_of_rows_more_than_the_tokens_fill),
        TEST(arguments_of_a_linear_are_inputs_then_sizes_then_output),
        TEST(arguments_of_a_partition_are_inputs_then_sizes_then_outputs),
        TEST(shared_memory_above_48_kib_is_asked_for_once),
        TEST(image_is_loaded_once_for_a_context),
        TEST(prepare_loads_what_any_number_of_tokens_needs),
        TEST(without_tokens_nothing_is_launched),
        TEST(gpu_without_kernels_is_told_which_there_are),
        TEST(newer_gpu_of_two_digits_is_named_in_full),
        TEST(group_size_without_kernels_is_named),
        TEST(driver_errors_say_what_was_done_and_why_it_failed),
        TEST(missing_driver_is_said_and_asked_for_again),
        TEST(thread_without_a_context_is_told),
        TEST(sizes_that_a_kernel_cannot_take_are_refused),
        TEST(pointers_must_be_there_and_aligned),
        TEST(threads_share_one_load_of_each_image),
    });
}
