#include "plugin_log.h"

#include <atomic>
#include <cstdio>
#include <exception>

namespace vlmdeploy {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
    nvinfer1::ILoggerFinder* finder = logger_finder.load();
    try {
        return finder != nullptr ? finder->findLogger() : nullptr;
    } catch (const std::exception&) {
        return nullptr;
    }
}

}  // namespace

void use_logger_of(nvinfer1::ILoggerFinder* finder) {
    logger_finder.store(finder);
}

void say(const char* plugin, const char* message) noexcept {
    char line[1024];
    std::snprintf(line, sizeof line, "vlmdeploy %s: %s", plugin, message);
    if (nvinfer1::ILogger* logger = find_logger()) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, line);
    } else {
        std::fprintf(stderr, "%s\n", line);
    }
}

}  // namespace vlmdeploy
