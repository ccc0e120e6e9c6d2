#include "launcher.h"

namespace vlmdeploy {

Launcher& process_launcher() {
    // Never destroyed: TensorRT may hold plugins until the process ends, after static objects are gone.
    static Launcher* const launcher = new Launcher(embedded_kernels(), cuda_driver);
    return *launcher;
}

}  // namespace vlmdeploy
