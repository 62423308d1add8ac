// The embeddings as the kernels read them: sorted, normalised, padded copies, cut into tiles. The rows are copied whole;
// the columns of a rectangular problem, which may be millions, a tile at a time. Included per instruction set.

constexpr int kTile = 192;  // largest tile; S, the two operands and the two gradients of a tile share the L2 cache
constexpr int kUnit = 48;   // tiles begin at multiples of this: a multiple of FP_MR and of kPanel
static_assert(kUnit % FP_MR == 0 && kUnit % kPanel<float> == 0 && kUnit % kPanel<double> == 0 && kTile % kUnit == 0);
// Or of this, where groups of whole units would be uneven: of FP_MR and of whole vectors.
constexpr int kFineUnit = std::lcm(FP_MR, kWidth<float>);
static_assert(kUnit % kFineUnit == 0);
constexpr double kUneven = 1.06;  // how much more than its share the largest group may have

// Uninitialised aligned memory.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { give_block(memory_); }
  void allocate(int64_t count) {
    give_block(memory_);
    memory_ = {};
    memory_ = take_block(count * int64_t(sizeof(T)) + 64);
  }
  void zero(int64_t count) { memset(get(), 0, count * sizeof(T)); }
  T* get() const { return static_cast<T*>(memory_.data); }
  T& operator[](int64_t i) const { return get()[i]; }
  explicit operator bool() const { return memory_.data != nullptr; }

 private:
  Block memory_;
};

// One call of a lambda.
template <class F>
void run_task(int64_t i, void* task) {
  const FlushedSubnormals flushed;
  (*static_cast<const F*>(task))(i);
}

// One call of a lambda per task.
template <class F>
void parallel_tasks(Parallel parallel, int64_t count, const F& task) {
  void* const context = const_cast<void*>(static_cast<const void*>(&task));
  if (count == 1) return run_task<F>(0, context);
  parallel(count, run_task<F>, context);
}

// The rows or the columns of S.
template <class T>
struct Side {
  int64_t count = 0, features = 0;
  int64_t width = 0;               // features in whole vectors
  int64_t ld = 0;                  // row stride: width, and never a power of two that would crowd one cache set
  const T* input = nullptr;        // (count, features)
  const int64_t* index = nullptr;  // position → row of the input
  const int32_t* label = nullptr;  // by position
  Buffer<T> data;                  // (count padded, ld); empty where tiles are staged
  Buffer<T> norm;                  // max(|x|, 1e-12); with `normalize`
  Buffer<T> square;                // |x|^2 of the copy; for distances
  Buffer<Lane<T>> label_lanes;     // labels as wide as the numbers
  uint64_t hash = 0;               // of the input

  int64_t padded() const { return round_up(count, kUnit); }

  // `whole`: keep a copy of all rows; else `stage` makes one of a tile.
  void prepare(const T* source, int64_t rows, int64_t depth, const Order& order, bool whole, bool normalize,
               bool squares, int threads, Parallel parallel) {
    input = source, count = rows, features = depth;
    width = round_up(depth > 0 ? depth : 1, kWidth<T>);
    ld = width * int64_t(sizeof(T)) % 1024 == 0 ? width + kWidth<T> : width;
    index = order.index.data();
    label = order.label.empty() ? nullptr : order.label.data();
    if (whole) {
      data.allocate(padded() * ld);
      memset(data.get() + count * ld, 0, (padded() - count) * ld * sizeof(T));
    }
    if (normalize) norm.allocate(padded());
    if (squares) square.allocate(padded() + kTile), square.zero(padded() + kTile);
    if (label) {
      label_lanes.allocate(padded() + kTile);
      label_lanes.zero(padded() + kTile);
      for (int64_t p = 0; p < count; ++p) label_lanes[p] = label[p];
    }
    const int64_t tasks = count > 256 ? threads : 1, step = (count + tasks - 1) / tasks;
    Buffer<uint64_t> hashes(tasks);
    parallel_tasks(parallel, tasks, [&](int64_t task) {
      uint64_t total = 0;
      Buffer<T> row;
      if (squares && !whole) row.allocate(ld);
      for (int64_t p = task * step; p < count && p < (task + 1) * step; ++p)
        total += measure_row(p, whole ? data.get() + p * ld : row.get(), normalize, squares);
      hashes[task] = total;
    });
    for (int64_t task = 0; task < tasks; ++task) hash += hashes[task];
  }

  // Copies rows [first, first + rows) to a tile (rows, ld), as `data` would hold them.
  void stage(int64_t first, int rows, T* tile) const {
    for (int r = 0; r < rows; ++r) copy_row(first + r, tile + r * ld);
  }

 private:
  // Features d, d + 1, ... of a row of the input, 0 past its end.
  Vec<T> features_from(const T* row, int64_t d) const {
    if (d + kWidth<T> <= features) return load(row + d);
    T lanes[kWidth<T>] = {};
    memcpy(lanes, row + d, (features - d) * sizeof(T));
    return load(lanes);
  }

  void copy_row(int64_t p, T* copy) const {
    const T* row = input + index[p] * features;
    if (norm) {
      const Vec<T> divisor = broadcast(norm[p]);
      for (int64_t d = 0; d < width; d += kWidth<T>) store(copy + d, features_from(row, d) / divisor);
    } else {
      memcpy(copy, row, features * sizeof(T));
      for (int64_t d = features; d < width; ++d) copy[d] = 0;
    }
    for (int64_t d = width; d < ld; ++d) copy[d] = 0;
  }

  // The norm of a row, its copy and square where they are wanted, and its share of the hash.
  uint64_t measure_row(int64_t p, T* copy, bool normalize, bool squares) {
    const T* row = input + index[p] * features;
    Vec<T> sum{};
    BitsVec<T> hash_lanes = BitsVec<T>{} + 0x1b873593;
    for (int64_t d = 0; d < width; d += kWidth<T>) {
      const Vec<T> v = features_from(row, d);
      sum += v * v;
      hash_lanes = (hash_lanes ^ BitsVec<T>(vec_to_bits<T>(v))) * 0x5bd1e995 + 0x5f356495;
    }
    T total = sum_lanes<T>(sum);
    if (normalize) {
      const T length = std::sqrt(total);
      const T divisor = length < T(1e-12) ? T(1e-12) : length;
      norm[p] = divisor;
    }
    if (copy) copy_row(p, copy);
    if (squares) {
      // As the matrix product rounds it, so that the distance of equal rows is exactly 0: lane 0 is |copy|^2.
      Vec<T> acc{};
      for (int64_t d = 0; d < features; ++d) acc += copy[d] * load(copy + d);
      T lanes[kWidth<T>];
      store(lanes, acc);
      asm volatile("" : : "r"(lanes) : "memory");  // all lanes are wanted: alone, lane 0 would be rounded otherwise
      square[p] = lanes[0];
    }
    // The lanes in pairs or one by one, each times an odd number of its own: products that do not wait for each other.
    uint64_t words[FP_VECTOR_BYTES / 8], mixed = uint64_t(index[p]) * 0x9e3779b97f4a7c15u;
    memcpy(words, &hash_lanes, sizeof words);
    for (int l = 0; l < FP_VECTOR_BYTES / 8; ++l)
      mixed += (words[l] ^ words[l] >> 29) * (0xff51afd7ed558ccdu + uint64_t(l) * 0x5851f42d4c957f2eu);
    mixed = (mixed ^ mixed >> 33) * 0xc4ceb9fe1a85ec53u;
    return mixed ^ mixed >> 33;
  }
};

// A side cut into groups of tiles: a group belongs to one thread at a time.
struct Tiling {
  int64_t tiles = 0, groups = 0;
  int64_t largest = 0;          // rows of the largest tile
  Buffer<int64_t> start;        // (tiles + 1,) first position of each tile
  Buffer<int64_t> group_start;  // (groups + 1,) first tile of each group

  void cut(int64_t count, int64_t wanted_groups) {
    tiles = 0, largest = 0;
    int64_t unit_rows = kUnit, units = (count + kUnit - 1) / kUnit;
    groups = wanted_groups < units ? wanted_groups : units;
    if (groups < 1) groups = 1;
    if (double((units + groups - 1) / groups * kUnit * groups) > kUneven * double(count))
      unit_rows = kFineUnit, units = (count + kFineUnit - 1) / kFineUnit;
    const int64_t per_tile = kTile / unit_rows;
    start.allocate(units + 2);
    group_start.allocate(groups + 1);
    int64_t unit = 0;
    for (int64_t g = 0; g < groups; ++g) {
      group_start[g] = tiles;
      const int64_t share = units / groups + (g < units % groups ? 1 : 0);
      const int64_t parts = (share + per_tile - 1) / per_tile;
      for (int64_t part = 0; part < parts; ++part) {
        start[tiles++] = unit * unit_rows;
        const int64_t own = share / parts + (part < share % parts ? 1 : 0);
        if (own * unit_rows > largest) largest = own * unit_rows;
        unit += own;
      }
    }
    group_start[groups] = tiles;
    start[tiles] = count;
  }
};
