// Where the plugins' errors go: TensorRT's logger.

#pragma once

#include "NvInfer.h"

namespace vlmdeploy {

// finder: asked at each message, in the thread that has something to say; null for none.
void use_logger_of(nvinfer1::ILoggerFinder* finder);

// One line, as an error. Without a logger (the library was loaded by other means than TensorRT's) it goes to stderr.
void say(const char* plugin, const char* message) noexcept;

}  // namespace vlmdeploy
