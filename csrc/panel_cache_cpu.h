// The kept similarity matrix: S of the last call, where it fits the workspace, for the pass that follows.
//
// It is a cache of a pure function, keyed by the contents of its inputs: a hit saves a matrix product, a miss costs
// one, and the result is the same to the bit. The memory stays for the next call (fresh pages cost as much as the
// arithmetic that they save) until it is released.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace flashpair {

struct PanelKey {
  uint64_t rows_hash = 0, columns_hash = 0, order_hash = 0;
  int64_t rows = 0, columns = 0, features = 0, groups = 0;  // which cut both sides into tiles
  int element_bytes = 0, vector_bytes = 0;
  bool symmetric = false, normalize = false;
  bool operator==(const PanelKey&) const = default;
};

class PanelCache {
 public:
  // The cache is one call's at a time; false while another thread has it, which then does without.
  bool try_lock();
  void unlock();

  // Is S of this key here?
  bool holds(const PanelKey& key) const;
  // Makes room for S of this key, nothing of it present yet; false where memory is short.
  bool prepare(const PanelKey& key, int64_t bytes, int64_t tiles);
  void release();

  void* data() const { return data_; }
  struct TileInfo {
    bool present;
    double low, high;  // of the tile's similarities
  };
  TileInfo* tiles() { return tiles_.data(); }
  int64_t bytes() const { return capacity_; }
  ~PanelCache();

 private:
  std::mutex mutex_;
  PanelKey key_;
  bool valid_ = false;
  void* data_ = nullptr;
  int64_t capacity_ = 0;
  std::vector<TileInfo> tiles_;
};

PanelCache& panel_cache();

}  // namespace flashpair
