// Prints what cuda_driver() finds on this machine: "ready", or why there is no driver. Its test puts libraries of its
// own in the way.

#include <iostream>

#include "cuda_driver.h"

int main() {
    std::string problem;
    const vlmdeploy::CudaDriver* driver = vlmdeploy::cuda_driver(problem);
    int device = -1;
    if (driver != nullptr && driver->ctx_get_device(&device) == 0) {
        std::cout << "ready, device " << device << "\n";
    } else {
        std::cout << problem << "\n";
    }
    return 0;
}
