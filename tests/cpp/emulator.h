// The device of csrc/device_cuda.h on the host: a block is kThreads fibers of one thread, so that the CUDA kernels run,
// and can be checked, without a GPU.
//
// A fiber runs until it meets a barrier or a collective of its warp; then the next one runs. Which is next is decided by
// `emulator_order()`, so that a result that depends on it reveals a race. Copies that CUDA may delay are delayed as long
// as it allows. A collective that not all lanes of a warp reach, and a barrier that not all threads reach, abort.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define FP_KERNEL(BLOCKS) void
#define FP_DEVICE inline
#define FP_SHARED static
#define FP_GRID_CONSTANT
#define FP_DYNAMIC_SHARED(name) char* name = flashpair::emulator::block().shared.data()
#define FP_UNROLL

namespace flashpair {
namespace emulator {

constexpr int kLanes = 32, kThreads = 256, kWarps = kThreads / kLanes;
constexpr size_t kStack = 256 << 10;

// --- fibers -----------------------------------------------------------------------------------------------------------

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif
// Saves the registers that a call preserves and the stack pointer in *from, then takes up `to`.
extern "C" void flashpair_switch_stack(void** from, void* to);
asm(R"(
.text
.weak flashpair_switch_stack
.type flashpair_switch_stack,@function
flashpair_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size flashpair_switch_stack,.-flashpair_switch_stack
)");

enum class Kind { none, shuffle_xor, shuffle_up, shuffle_from, ballot, matrices, multiply };

struct Copy {
  void* to;
  const void* from;
  int valid;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not yet committed
};

struct Warp {
  int arrived = 0;
  int64_t generation = 0;
  Kind kind = Kind::none;
  alignas(16) char slots[2][kLanes][64];
};

struct Block {
  Fiber fibers[kThreads];
  Warp warps[kWarps];
  int arrived = 0, current = 0;
  int64_t generation = 0, index = 0, progress = 0;
  void* scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void (*run)(void*) = nullptr;
  void* context = nullptr;
  std::vector<char> shared;
};

inline Block& block() {
  static Block only;
  return only;
}
// FLASHPAIR_EMULATOR_ORDER: 0 for ascending threads and 1 for descending, all warps abreast; else the seed of a random
// order in which each warp runs as far as it can before the next one begins.
inline int64_t emulator_order() {
  const char* asked = getenv("FLASHPAIR_EMULATOR_ORDER");
  return asked ? atoll(asked) : 0;
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s (block %lld, thread %d)\n", what, (long long)(block().index), block().current);
  abort();
}

// Back to the scheduler, which comes back some time.
inline void yield() {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fake, b.scheduler_stack, b.scheduler_stack_size);
#endif
  flashpair_switch_stack(&fiber.stack_pointer, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
}

inline void fiber_main() {
  Block& b = block();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
  b.run(b.context);
  Fiber& fiber = b.fibers[b.current];
  if (!fiber.open.empty()) fail("a copy was never committed");
  fiber.groups.clear();
  fiber.done = true;
  ++b.progress;
  yield();
  fail("a finished thread was taken up again");
}

inline void resume(int thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  flashpair_switch_stack(&b.scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void run_block(int64_t index, int shared_bytes, void (*run)(void*), void* context) {
  Block& b = block();
  const int64_t seed = emulator_order();
  b.index = index, b.run = run, b.context = context, b.arrived = 0;
  b.shared.assign(size_t(shared_bytes) + 16, char(0xff));  // NaN in every format
  int order[kThreads];
  for (int t = 0; t < kThreads; ++t) {
    order[t] = seed == 1 ? kThreads - 1 - t : t;
    Fiber& fiber = b.fibers[t];
    if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, kStack));
    fiber.done = false;
    // As if the fiber had just called the switch: six registers, then where to return to, on an aligned stack.
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    fiber.stack_pointer = top;
  }
  for (Warp& warp : b.warps) warp.arrived = 0;
  uint64_t random = uint64_t(seed) * 0x9e3779b97f4a7c15u + uint64_t(index) + 1;
  auto shuffle = [&](int* first, int count) {
    for (int k = count - 1; k > 0; --k) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      const int other = int(random % uint64_t(k + 1)), swap = first[k];
      first[k] = first[other], first[other] = swap;
    }
  };
  auto run_once = [&](const int* first, int count) {
    const int64_t before = b.progress;
    for (int k = 0; k < count; ++k)
      if (!b.fibers[first[k]].done) resume(first[k]);
    return b.progress != before;
  };
  for (int alive = kThreads; alive;) {
    bool progress = false;
    if (seed > 1) {
      int warps[kWarps], lanes[kLanes];
      for (int w = 0; w < kWarps; ++w) warps[w] = w;
      shuffle(warps, kWarps);
      for (int warp : warps) {
        for (int l = 0; l < kLanes; ++l) lanes[l] = warp * kLanes + l;
        shuffle(lanes, kLanes);
        while (run_once(lanes, kLanes)) progress = true;
      }
    } else {
      progress = run_once(order, kThreads);
    }
    alive = 0;
    for (const Fiber& fiber : b.fibers) alive += !fiber.done;
    if (alive && !progress) fail("a barrier or collective that not all threads reach");
  }
}

// --- collectives ------------------------------------------------------------------------------------------------------

// All lanes of the warp show `mine`; `pick(lane)` reads what a lane showed.
template <class V, class F>
auto exchange(Kind kind, const V& mine, F pick) {
  static_assert(sizeof(V) <= 64);
  Block& b = block();
  const int lane = b.current % kLanes;
  Warp& warp = b.warps[b.current / kLanes];
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp are at different collectives");
  const int64_t generation = warp.generation;
  char (*slots)[64] = warp.slots[generation & 1];
  memcpy(slots[lane], &mine, sizeof mine);
  ++b.progress;
  if (++warp.arrived == kLanes)
    warp.arrived = 0, ++warp.generation;
  else
    while (warp.generation == generation) yield();
  return pick([&](int from) {
    V value;
    memcpy(&value, slots[from], sizeof value);
    return value;
  });
}

template <class... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  template <class... Arguments>
  void operator()(const Arguments&... arguments) const {
    kernel(arguments...);
  }
};

}  // namespace emulator

inline int thread_index() { return emulator::block().current; }
inline int block_index() { return int(emulator::block().index); }
inline void sync_block() {
  emulator::Block& b = emulator::block();
  const int64_t generation = b.generation;
  ++b.progress;
  if (++b.arrived == emulator::kThreads)
    b.arrived = 0, ++b.generation;
  else
    while (b.generation == generation) emulator::yield();
}
template <class T>
T shuffle_xor(T value, int lanes) {
  const int lane = thread_index() % emulator::kLanes;
  return emulator::exchange(emulator::Kind::shuffle_xor, value, [&](auto of) { return of(lane ^ lanes); });
}
template <class T>
T shuffle_up(T value, int lanes) {
  const int lane = thread_index() % emulator::kLanes;
  return emulator::exchange(emulator::Kind::shuffle_up, value,
                            [&](auto of) { return of(lane < lanes ? lane : lane - lanes); });
}
template <class T>
T shuffle_from(T value, int lane) {
  return emulator::exchange(emulator::Kind::shuffle_from, value, [&](auto of) { return of(lane); });
}
inline unsigned ballot(bool vote) {
  return emulator::exchange(emulator::Kind::ballot, vote, [](auto of) {
    unsigned bits = 0;
    for (int lane = 0; lane < emulator::kLanes; ++lane) bits |= unsigned(of(lane)) << lane;
    return bits;
  });
}
inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }
inline int first_bit(unsigned bits) { return __builtin_ffs(int(bits)) - 1; }

template <class V>
void check_aligned(const V* memory) {
  const size_t alignment = sizeof(V) >= 4 ? 16 : 8;
  if (reinterpret_cast<uintptr_t>(memory) % alignment) emulator::fail("four numbers at once are not aligned");
}
template <class V>
void load4(V (&to)[4], const V* from) {
  check_aligned(from);
  memcpy(to, from, sizeof to);
}
template <class V>
void store4(V* to, const V (&values)[4]) {
  check_aligned(to);
  memcpy(to, values, sizeof values);
}

// --- 16-bit numbers ---------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
inline uint16_t to_bits(float value, Half) {
  const _Float16 narrow = _Float16(value);
  uint16_t bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}
inline uint16_t to_bits(float value, BFloat16) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float to_float(Half v) {
  _Float16 narrow;
  memcpy(&narrow, &v.bits, 2);
  return float(narrow);
}
inline float to_float(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// --- asynchronous copies and matrices: what mma_cuda.h asks for -----------------------------------------------------------

inline void copy16_async(void* to, const void* from, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
    emulator::fail("an asynchronous copy is not aligned to 16 bytes");
  emulator::Block& b = emulator::block();
  b.fibers[b.current].open.push_back({to, from, valid});
}
inline void commit_copies() {
  emulator::Fiber& fiber = emulator::block().fibers[thread_index()];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int N>
void wait_copies() {
  emulator::Fiber& fiber = emulator::block().fibers[thread_index()];
  while (fiber.groups.size() > size_t(N)) {
    for (const emulator::Copy& copy : fiber.groups.front()) {
      memset(copy.to, 0, 16);
      if (copy.valid) memcpy(copy.to, copy.from, size_t(copy.valid));
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

inline void load_matrices(unsigned (&out)[4], const void* row) {
  const int lane = thread_index() % emulator::kLanes;
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a matrix row is not aligned to 16 bytes");
  emulator::exchange(emulator::Kind::matrices, row, [&](auto of) {
    for (int matrix = 0; matrix < 4; ++matrix)
      memcpy(&out[matrix], static_cast<const char*>(of(matrix * 8 + lane / 4)) + lane % 4 * 4, 4);
    return 0;
  });
}
template <class Input>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Input) {
  struct Fragments {
    unsigned a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const int group = thread_index() % emulator::kLanes / 4, pair = thread_index() % 4;
  emulator::exchange(emulator::Kind::multiply, mine, [&](auto of) {
    auto number = [](unsigned word, int half) { return to_float(Input{uint16_t(word >> (16 * half))}); };
    for (int k = 0; k < 16; ++k) {
      // a: rows group and group + 8, features 2 t, 2 t + 1 (and + 8) in lane 4 group + t; b: the same by column.
      const int from = k % 8 / 2, upper = k / 8, half = k % 2;
      const Fragments row = of(group * 4 + from), left = of(pair * 2 * 4 + from), right = of((pair * 2 + 1) * 4 + from);
      const float top = number(row.a[upper * 2], half), bottom = number(row.a[upper * 2 + 1], half);
      c[0] += top * number(left.b[upper], half), c[1] += top * number(right.b[upper], half);
      c[2] += bottom * number(left.b[upper], half), c[3] += bottom * number(right.b[upper], half);
    }
    return 0;
  });
}

// --- starting kernels ---------------------------------------------------------------------------------------------------

using Stream = void*;
using Status = int;
inline const char* describe(Status) { return nullptr; }

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, Stream, Arguments... arguments) {
  if (shared_bytes > 99 * 1024) emulator::fail("more shared memory than a block has on every GPU with tensor cores");
  auto call = [&] { kernel(arguments...); };
  for (int64_t index = 0; index < blocks; ++index)
    emulator::run_block(index, shared_bytes, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
  return 0;
}

}  // namespace flashpair
