#include "panel_cache_cpu.h"

#include <cstdint>
#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flashpair {
namespace {

constexpr int64_t kPage = int64_t(2) << 20;  // a huge page

// Whole huge pages, which many systems give to those who ask only; nullptr where memory is short.
#ifdef __linux__
void* take_pages(int64_t bytes) {
  // Memory of its own, not the heap's: what is asked of the system must not stay with those who have it next.
  void* taken = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (taken == MAP_FAILED) return nullptr;
  char *first = static_cast<char*>(taken), *end = first + bytes + kPage;
  char* data = first + (kPage - int64_t(reinterpret_cast<uintptr_t>(first) % kPage)) % kPage;
  if (data > first) munmap(first, data - first);
  if (data + bytes < end) munmap(data + bytes, end - (data + bytes));
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}
void give_pages(void* data, int64_t bytes) {
  if (data) munmap(data, bytes);
}
#else
void* take_pages(int64_t bytes) { return std::aligned_alloc(kPage, bytes); }
void give_pages(void* data, int64_t) { std::free(data); }
#endif

}  // namespace

bool PanelCache::try_lock() { return mutex_.try_lock(); }
void PanelCache::unlock() { mutex_.unlock(); }
bool PanelCache::holds(const PanelKey& key) const { return valid_ && key_ == key; }
PanelCache::~PanelCache() { release(); }

bool PanelCache::prepare(const PanelKey& key, int64_t bytes, int64_t tiles) {
  valid_ = false;
  if (bytes > capacity_) {
    release();
    const int64_t rounded = (bytes + kPage - 1) / kPage * kPage;
    data_ = take_pages(rounded);
    if (data_ == nullptr) return false;
    capacity_ = rounded;
  }
  tiles_.assign(tiles, TileInfo{false, 0, 0});
  key_ = key;
  valid_ = true;
  return true;
}

void PanelCache::release() {
  give_pages(data_, capacity_);
  data_ = nullptr;
  capacity_ = 0;
  valid_ = false;
}

PanelCache& panel_cache() {
  static PanelCache cache;
  return cache;
}

}  // namespace flashpair
