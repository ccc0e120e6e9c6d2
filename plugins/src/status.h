// The outcome of a step: nothing, or one line that says what was found and what was expected.

#pragma once

#include <string>
#include <utility>

namespace vlmdeploy {

struct Status {
    std::string message;  // empty: it worked

    bool ok() const { return message.empty(); }
};

inline Status failure(std::string message) {
    return Status{std::move(message)};
}

}  // namespace vlmdeploy
