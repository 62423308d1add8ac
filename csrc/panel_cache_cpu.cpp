#include "panel_cache_cpu.h"

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace flashpair {

bool PanelCache::try_lock() { return mutex_.try_lock(); }
void PanelCache::unlock() { mutex_.unlock(); }
bool PanelCache::holds(const PanelKey& key) const { return valid_ && key_ == key; }
PanelCache::~PanelCache() { release(); }

bool PanelCache::prepare(const PanelKey& key, int64_t bytes, int64_t tiles) {
  valid_ = false;
  if (bytes > capacity_) {
    release();
    // A whole number of huge pages, which many systems give to those who ask only.
    const int64_t page = int64_t(2) << 20, rounded = (bytes + page - 1) / page * page;
    data_ = std::aligned_alloc(page, rounded);
    if (data_ == nullptr) return false;
#ifdef __linux__
    madvise(data_, rounded, MADV_HUGEPAGE);
#endif
    capacity_ = rounded;
  }
  tiles_.assign(tiles, TileInfo{false, 0, 0});
  key_ = key;
  valid_ = true;
  return true;
}

void PanelCache::release() {
#ifdef __linux__
  if (data_) madvise(data_, capacity_, MADV_NOHUGEPAGE);  // the pages may be others' next
#endif
  std::free(data_);
  data_ = nullptr;
  capacity_ = 0;
  valid_ = false;
}

PanelCache& panel_cache() {
  static PanelCache cache;
  return cache;
}

}  // namespace flashpair
