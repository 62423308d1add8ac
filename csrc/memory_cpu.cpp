#include "memory_cpu.h"

#include <cstdlib>
#include <mutex>

namespace flashpair {
namespace {

constexpr int64_t kSmall = int64_t(32) << 10;  // below, malloc keeps pages itself
constexpr int64_t kLarge = int64_t(16) << 20;  // from here the arithmetic of a call is worth its pages
constexpr int64_t kMost = int64_t(64) << 20;   // of idle memory

// Memory that no call has. Nobody waits for it: while another thread looks, memory is the system's.
class Idle {
 public:
  // The smallest that is large enough, and not so much larger that a larger call would miss it; of equal ones the last.
  Block take(int64_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    int best = -1;
    for (int k = 0; lock && k < count_; ++k)
      if (blocks_[k].bytes >= bytes && blocks_[k].bytes <= 2 * bytes &&
          (best < 0 || blocks_[k].bytes <= blocks_[best].bytes))
        best = k;
    return best < 0 ? Block{} : remove(best);
  }

  // Makes room for it at the expense of those that have been idle longest.
  void give(Block block) {
    Block out[kBlocks];
    int outs = 0;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock) {
        out[outs++] = block;
      } else {
        while (count_ > 0 && (count_ == kBlocks || total_ + block.bytes > kMost)) out[outs++] = remove(0);
        blocks_[count_++] = block;
        total_ += block.bytes;
      }
    }
    for (int k = 0; k < outs; ++k) std::free(out[k].data);
  }

  int64_t release() {
    int64_t bytes = 0;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    while (lock && count_ > 0) {
      const Block block = remove(0);
      bytes += block.bytes;
      std::free(block.data);
    }
    return bytes;
  }

 private:
  static constexpr int kBlocks = 256;

  Block remove(int at) {
    const Block found = blocks_[at];
    total_ -= found.bytes, --count_;
    for (int k = at; k < count_; ++k) blocks_[k] = blocks_[k + 1];
    return found;
  }

  std::mutex mutex_;
  Block blocks_[kBlocks];  // the one that was given last at the end
  int count_ = 0;
  int64_t total_ = 0;
};

Idle& idle() {
  static Idle& memory = *new Idle;  // for ever: a thread may outlive what is destroyed at the end
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
