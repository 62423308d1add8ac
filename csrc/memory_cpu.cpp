#include "memory_cpu.h"

#include <cstdlib>
#include <mutex>
#include <vector>

namespace flashpair {
namespace {

constexpr int64_t kSmall = int64_t(32) << 10;  // below, malloc keeps pages itself
constexpr int64_t kLarge = int64_t(16) << 20;  // from here the arithmetic of a call is worth its pages
constexpr int64_t kMost = int64_t(64) << 20;   // of idle memory

// Memory that no call has.
class Idle {
 public:
  ~Idle() { release(); }

  // The smallest that is large enough, and not so much larger that a larger call would miss it.
  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes && (best == idle_.end() || it->bytes < best->bytes)) best = it;
    if (best == idle_.end()) return {};
    const Block found = *best;
    total_ -= found.bytes;
    idle_.erase(best);
    return found;
  }

  // Makes room for it at the expense of those that have been idle longest.
  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(block);
    total_ += block.bytes;
    size_t out = 0;
    for (; total_ > kMost; ++out) total_ -= idle_[out].bytes, std::free(idle_[out].data);
    idle_.erase(idle_.begin(), idle_.begin() + out);
  }

  int64_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t bytes = total_;
    for (const Block& block : idle_) std::free(block.data);
    idle_.clear();
    total_ = 0;
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> idle_;  // the one that was given last at the end
  int64_t total_ = 0;
};

Idle& idle() {
  static Idle memory;
  return memory;
}

bool kept(int64_t bytes) { return blocks_are_kept() && bytes >= kSmall && bytes < kLarge; }

}  // namespace

Block take_block(int64_t bytes) {
  if (kept(bytes)) {
    const Block found = idle().take(bytes);
    if (found.data) return found;
  }
  const int64_t rounded = (bytes + 63) / 64 * 64;
  return {std::aligned_alloc(64, rounded), rounded};
}

void give_block(Block block) {
  if (block.data && kept(block.bytes))
    idle().give(block);
  else
    std::free(block.data);
}

bool blocks_are_kept() {
#if defined(__SANITIZE_ADDRESS__)  // GCC
  return false;
#elif defined(__has_feature)
  return !__has_feature(address_sanitizer);
#else
  return true;
#endif
}

int64_t release_blocks() { return idle().release(); }

}  // namespace flashpair
