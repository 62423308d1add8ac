// What the processor can do at most: independent multiply-adds in registers, on as many threads as asked for.
// Prints GFLOP/s in float32. Compiled by machine.py with -march=native.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
constexpr int kChains = 12;  // more than latency times throughput of any processor so far

static float run(long steps, float seed) {
  Vector a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11;
  const Vector x = Vector{} + (0.9999f + seed), y = Vector{} + 1e-6f;
#define ALL(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define BEGIN(i) a##i = Vector{} + (0.1f + 0.01f * i);
#define STEP(i) a##i = a##i * x + y;
#define END(i) a0 += a##i;
  ALL(BEGIN)
  for (long k = 0; k < steps; ++k) {
    ALL(STEP)
  }
  ALL(END)
  float total = 0;
  for (int l = 0; l < kLanes; ++l) total += a0[l];
  return total;
}

int main(int count, char** arguments) {
  const int threads = count > 1 ? atoi(arguments[1]) : 1;
  const long steps = 20000000;
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<std::thread> started;
    std::vector<float> results(threads);
    const auto start = std::chrono::steady_clock::now();
    for (int t = 0; t < threads; ++t) started.emplace_back([&, t] { results[t] = run(steps, float(count) * 1e-9f); });
    for (std::thread& thread : started) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = 2.0 * kLanes * kChains * steps * threads / seconds / 1e9;
    if (rate > best && results[0] == results[0]) best = rate;
  }
  printf("%.1f\n", best);
}
