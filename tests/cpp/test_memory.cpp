// memory_cpu.h.

#include <atomic>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "memory_cpu.h"

namespace {

using namespace flashpair;

constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;

TEST(blocks_are_aligned_and_large_enough) {
  for (int64_t bytes : {int64_t(1), int64_t(63), 32 * kKiB - 1, 32 * kKiB, 5 * kMiB + 1, 16 * kMiB, 17 * kMiB}) {
    const Block block = take_block(bytes);
    CHECK(block.bytes >= bytes);
    CHECK(reinterpret_cast<uintptr_t>(block.data) % 64 == 0);
    memset(block.data, 1, bytes);
    give_block(block);
  }
  release_blocks();
}

TEST(what_was_given_back_is_taken_again) {
  release_blocks();
  Block block = take_block(100 * kKiB);
  void* const data = block.data;
  give_block(block);
  if (!blocks_are_kept()) return;
  block = take_block(90 * kKiB);
  CHECK(block.data == data);
  const Block other = take_block(90 * kKiB);
  CHECK(other.data != data);
  give_block(block), give_block(other);
  CHECK(release_blocks() >= 190 * kKiB);
  CHECK(release_blocks() == 0);
}

TEST(a_small_block_does_not_take_a_large_one) {
  release_blocks();
  const Block large = take_block(8 * kMiB);
  give_block(large);
  const Block small = take_block(100 * kKiB);
  CHECK(!blocks_are_kept() || small.data != large.data);
  give_block(small);
  release_blocks();
}

TEST(the_smallest_that_fits_is_taken) {
  release_blocks();
  const Block large = take_block(150 * kKiB), small = take_block(100 * kKiB);
  give_block(small), give_block(large);
  const Block found = take_block(99 * kKiB);
  CHECK(!blocks_are_kept() || found.data == small.data);
  give_block(found);
  release_blocks();
}

TEST(little_memory_is_idle) {
  release_blocks();
  Block blocks[40];
  std::set<void*> distinct;
  for (Block& block : blocks) block = take_block(3 * kMiB), distinct.insert(block.data);
  CHECK(distinct.size() == 40);
  for (const Block& block : blocks) give_block(block);
  const int64_t idle = release_blocks();
  CHECK(!blocks_are_kept() || (idle > 60 * kMiB && idle <= 64 * kMiB));
  give_block(take_block(20 * kMiB));  // too large to be kept
  CHECK(release_blocks() == 0);
}

TEST(no_two_threads_have_a_block) {
  std::atomic<int> clashes = 0;
  std::vector<std::thread> threads;
  for (int id = 0; id < 4; ++id)
    threads.emplace_back([&clashes, id] {
      for (int round = 0; round < 20000; ++round) {
        const Block blocks[2] = {take_block(40 * kKiB), take_block((40 + 10 * (round % 5)) * kKiB)};
        for (const Block& block : blocks) static_cast<volatile char*>(block.data)[0] = char(id);
        for (const Block& block : blocks) clashes += static_cast<volatile char*>(block.data)[0] != char(id);
        for (const Block& block : blocks) give_block(block);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(clashes == 0);
  release_blocks();
}

}  // namespace
