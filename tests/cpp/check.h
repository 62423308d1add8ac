// A test program in one header: TEST(name) { CHECK(...); }, one of the files defines FP_TEST_MAIN first.
//
//   program            runs all tests
//   program text ...   runs those whose name holds one of the texts
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
inline int64_t& checks() {
  static int64_t count = 0;
  return count;
}
// What the test is at, printed with a failure.
inline std::string& context() {
  static std::string text;
  return text;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

constexpr int kShown = 20;  // failures that are printed

inline bool report(bool good, const char* file, int line, const std::string& what) {
  ++checks();
  if (good) return true;
  if (++failures() <= kShown)
    std::fprintf(stderr, "%s:%d: %s%s%s\n", file, line, what.c_str(), context().empty() ? "" : "; ", context().c_str());
  return false;
}

inline std::string number(long double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.12Lg", value);
  return text;
}

// Equal up to `bound`; NaN equals NaN, an infinity itself.
inline bool close(long double got, long double want, long double bound) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  if (std::isinf(want) || std::isinf(got)) return got == want;
  return std::fabs(got - want) <= bound;
}

inline bool report_close(long double got, long double want, long double bound, const char* file, int line,
                         const char* what) {
  const bool good = close(got, want, bound);
  if (good) return report(true, file, line, "");
  return report(false, file, line,
                std::string(what) + " is " + number(got) + ", wanted " + number(want) + " within " + number(bound));
}

// Numbers that are the same wherever the test runs.
struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  uint64_t below(uint64_t bound) { return engine() % bound; }
  double uniform(double low, double high) { return low + (high - low) * double(engine() >> 11) * 0x1p-53; }
};

}  // namespace check

#define FP_JOIN_(a, b) a##b
#define FP_JOIN(a, b) FP_JOIN_(a, b)
#define TEST(name)                                                        \
  static void name();                                                     \
  static const check::Register FP_JOIN(register_, __LINE__)(#name, name); \
  static void name()
#define CHECK(...) check::report((__VA_ARGS__), __FILE__, __LINE__, #__VA_ARGS__)
#define CHECK_CLOSE(got, want, bound) check::report_close((got), (want), (bound), __FILE__, __LINE__, #got)

#if defined(FP_TEST_MAIN)
int main(int count, char** arguments) {
  int run = 0;
  for (const check::Test& test : check::tests()) {
    bool asked = count < 2;
    for (int k = 1; k < count; ++k) asked |= std::strstr(test.name, arguments[k]) != nullptr;
    if (!asked) continue;
    check::context().clear();
    const int before = check::failures();
    test.run();
    ++run;
    if (check::failures() != before) std::fprintf(stderr, "%s failed\n", test.name);
  }
  std::printf("%d tests, %lld checks, %d failures\n", run, (long long)check::checks(), check::failures());
  return check::failures() != 0 || run == 0;
}
#endif
