// The three matrix products of a tile on register blocks of FP_MR rows and FP_NV vectors. Included per instruction set.
//
//   S = X Y^T      gemm_similarity, Y packed by `pack_columns` into panels of kPanel columns
//   dX += W Y      gemm_rows
//   dY += W^T X    gemm_columns
//
// Rows are computed in multiples of FP_MR: the operands are padded, what lands in the padding is never read.

template <class T>
constexpr int kPanel = FP_NV * kWidth<T>;

// Memory that the next tile reads: the register blocks of this one fetch it into the L2 cache, an even share each.
class Ahead {
 public:
  template <class T>
  void add(const T* from, int64_t count) {
    if (from == nullptr || count <= 0) return;
    ranges_[count_++] = {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + count)};
    lines_ += (count * int64_t(sizeof(T)) + kLine - 1) / kLine;
  }
  void share(int64_t blocks) { share_ = blocks > 0 ? int((lines_ + blocks - 1) / blocks) : 0; }
  FP_INLINE void fetch() {
    for (int line = 0; line < share_ && at_ < count_; ++line) {
      Range& range = ranges_[at_];
      __builtin_prefetch(range.next, 0, 2);
      range.next += kLine;
      if (range.next >= range.end) ++at_;
    }
  }

 private:
  static constexpr int kLine = 64;
  struct Range {
    const char *next, *end;
  };
  Range ranges_[3];
  int64_t lines_ = 0;
  int count_ = 0, at_ = 0, share_ = 0;
};

// C (MR, NV vectors) = or += sum_k A_ik B_k; A_ik is A[i * lda + k], or A[k * lda + i] when TRANSPOSED.
template <class T, int NV, bool TRANSPOSED, bool ACCUMULATE>
FP_INLINE void micro_kernel(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vec<T> acc[FP_MR][NV];
  for (int i = 0; i < FP_MR; ++i)
    for (int v = 0; v < NV; ++v) {
      acc[i][v] = Vec<T>{};
      __builtin_prefetch(c + i * ldc + v * kWidth<T>, 1);
    }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load(b + k * ldb + v * kWidth<T>);
    for (int i = 0; i < FP_MR; ++i) {
      const T value = TRANSPOSED ? a[k * lda + i] : a[i * lda + k];
      for (int v = 0; v < NV; ++v) acc[i][v] += value * row[v];
    }
  }
  for (int i = 0; i < FP_MR; ++i)
    for (int v = 0; v < NV; ++v) {
      T* out = c + i * ldc + v * kWidth<T>;
      store(out, ACCUMULATE ? load(out) + acc[i][v] : acc[i][v]);
    }
}

// Y (count, depth) row-major → panels (count / kPanel, depth, kPanel), missing columns 0.
template <class T>
void pack_columns(const T* y, int64_t ld, int64_t count, int64_t depth, T* packed) {
  for (int64_t first = 0; first < count; first += kPanel<T>) {
    const int64_t valid = count - first < kPanel<T> ? count - first : kPanel<T>;
    for (int64_t j = 0; j < valid; ++j) {
      const T* row = y + (first + j) * ld;
      for (int64_t k = 0; k < depth; ++k) packed[k * kPanel<T> + j] = row[k];
    }
    for (int64_t j = valid; j < kPanel<T>; ++j)
      for (int64_t k = 0; k < depth; ++k) packed[k * kPanel<T> + j] = 0;
    packed += depth * kPanel<T>;
  }
}

// One panel of packed columns, of which so many vectors are wanted.
template <class T, int NV>
FP_INLINE void similarity_panel(int64_t vectors, const T* x, int64_t ld, int64_t rows, const T* packed, int64_t depth,
                                T* s, int64_t lds, Ahead& ahead) {
  if constexpr (NV > 1) {
    if (vectors < NV) return similarity_panel<T, NV - 1>(vectors, x, ld, rows, packed, depth, s, lds, ahead);
  }
  for (int64_t i = 0; i < rows; i += FP_MR) {
    ahead.fetch();
    micro_kernel<T, NV, false, false>(depth, x + i * ld, ld, packed, kPanel<T>, s + i * lds, lds);
  }
}

template <class T>
void gemm_similarity(const T* x, int64_t ld, int64_t rows, const T* packed, int64_t columns, int64_t depth, T* s,
                     int64_t lds, Ahead& ahead) {
  ahead.share(round_up(columns, kPanel<T>) / kPanel<T> * (round_up(rows, FP_MR) / FP_MR));
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    const int64_t vectors = (columns - j + kWidth<T> - 1) / kWidth<T>;
    similarity_panel<T, FP_NV>(vectors, x, ld, rows, packed, depth, s + j, lds, ahead);
    packed += depth * kPanel<T>;
  }
}

// G (rows, width) += op(W) (rows, depth) B (depth, width); width is a whole number of vectors.
template <class T, int NV, bool TRANSPOSED>
FP_INLINE void accumulate_panel(int64_t vectors, const T* w, int64_t ldw, int64_t rows, int64_t depth, const T* b,
                                int64_t ldb, T* g, int64_t ldg, Ahead& ahead) {
  if constexpr (NV > 1) {
    if (vectors < NV)
      return accumulate_panel<T, NV - 1, TRANSPOSED>(vectors, w, ldw, rows, depth, b, ldb, g, ldg, ahead);
  }
  for (int64_t i = 0; i < rows; i += FP_MR) {
    ahead.fetch();
    micro_kernel<T, NV, TRANSPOSED, true>(depth, TRANSPOSED ? w + i : w + i * ldw, ldw, b, ldb, g + i * ldg, ldg);
  }
}

// G (rows, width) += op(W) (rows, depth) B (depth, width); width is a whole number of vectors.
template <class T, bool TRANSPOSED>
FP_INLINE void gemm_accumulate(const T* w, int64_t ldw, int64_t rows, int64_t depth, const T* b, int64_t ldb,
                               int64_t width, T* g, int64_t ldg, Ahead& ahead) {
  const int64_t vectors = width / kWidth<T>, panels = (vectors + FP_NV - 1) / FP_NV;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * vectors / panels * kWidth<T>, own = (p + 1) * vectors / panels - p * vectors / panels;
    accumulate_panel<T, FP_NV, TRANSPOSED>(own, w, ldw, rows, depth, b + first, ldb, g + first, ldg, ahead);
  }
}

template <class T>
void gemm_rows(const T* w, int64_t ldw, int64_t rows, int64_t columns, const T* y, int64_t ldy, int64_t width, T* dx,
               int64_t ldx, Ahead& ahead) {
  gemm_accumulate<T, false>(w, ldw, rows, columns, y, ldy, width, dx, ldx, ahead);
}

template <class T>
void gemm_columns(const T* w, int64_t ldw, int64_t rows, int64_t columns, const T* x, int64_t ldx, int64_t width, T* dy,
                  int64_t ldy, Ahead& ahead) {
  gemm_accumulate<T, true>(w, ldw, columns, rows, x, ldx, width, dy, ldy, ahead);
}
