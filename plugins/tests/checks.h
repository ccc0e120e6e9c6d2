// Checks that print what failed, and the loop over the tests of a program.

#pragma once

#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace checks {

inline int& num_failed() {
    static int count = 0;
    return count;
}

inline void fail(const char* file, int line, const std::string& text) {
    std::cerr << file << ":" << line << ": " << text << "\n";
    ++num_failed();
}

template <typename Found, typename Expected>
void equal(const char* file, int line, const char* text, const Found& found, const Expected& expected) {
    if (!(found == expected)) {
        std::ostringstream message;
        message << text << " is " << found << ", expected " << expected;
        fail(file, line, message.str());
    }
}

inline void contains(const char* file, int line, const std::string& found, const std::string& part) {
    if (found.find(part) == std::string::npos) {
        fail(file, line, "\"" + found + "\" does not contain \"" + part + "\"");
    }
}

struct Test {
    const char* name;
    void (*run)();
};

inline int run_all(const std::vector<Test>& tests) {
    int num_bad = 0;
    for (const Test& test : tests) {
        const int before = num_failed();
        test.run();
        const bool is_good = num_failed() == before;
        num_bad += is_good ? 0 : 1;
        std::cout << (is_good ? "ok " : "FAILED ") << test.name << "\n";
    }
    return num_bad == 0 ? 0 : 1;
}

}  // namespace checks

#define CHECK(condition)                                              \
    do {                                                              \
        if (!(condition))                                             \
            checks::fail(__FILE__, __LINE__, #condition " is false"); \
    } while (false)
#define CHECK_EQUAL(found, expected) checks::equal(__FILE__, __LINE__, #found, found, expected)
#define CHECK_CONTAINS(found, part) checks::contains(__FILE__, __LINE__, found, part)
#define TEST(name)  \
    checks::Test {  \
        #name, name \
    }
