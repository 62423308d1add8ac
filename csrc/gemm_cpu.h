// The three matrix products of a tile on register blocks of FP_MR rows and FP_NV vectors. Included per instruction set.
//
//   S = X Y^T      gemm_similarity, Y packed by `pack_columns` into panels of kPanel columns
//   dX += W Y      gemm_rows
//   dY += W^T X    gemm_columns
//
// Rows are computed in multiples of FP_MR: the operands are padded, what lands in the padding is never read.

template <class T>
constexpr int kPanel = FP_NV * kWidth<T>;

// C (MR, NV vectors) = or += sum_k A_ik B_k; A_ik is A[i * lda + k], or A[k * lda + i] when TRANSPOSED.
template <class T, int NV, bool TRANSPOSED, bool ACCUMULATE>
FP_INLINE void micro_kernel(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vec<T> acc[FP_MR][NV];
  for (int i = 0; i < FP_MR; ++i)
    for (int v = 0; v < NV; ++v) acc[i][v] = Vec<T>{};
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

template <class T>
void gemm_similarity(const T* x, int64_t ld, int64_t rows, const T* packed, int64_t columns, int64_t depth, T* s,
                     int64_t lds) {
  for (int64_t j = 0; j < columns; j += kPanel<T>) {
    for (int64_t i = 0; i < rows; i += FP_MR)
      micro_kernel<T, FP_NV, false, false>(depth, x + i * ld, ld, packed, kPanel<T>, s + i * lds + j, lds);
    packed += depth * kPanel<T>;
  }
}

// G (rows, width) += op(W) (rows, depth) B (depth, width); width is a whole number of vectors.
template <class T, bool TRANSPOSED>
FP_INLINE void gemm_accumulate(const T* w, int64_t ldw, int64_t rows, int64_t depth, const T* b, int64_t ldb,
                               int64_t width, T* g, int64_t ldg) {
  for (int64_t d = 0; d < width;) {
    const bool whole = width - d >= kPanel<T>;
    for (int64_t i = 0; i < rows; i += FP_MR) {
      const T* a = TRANSPOSED ? w + i : w + i * ldw;
      if (whole)
        micro_kernel<T, FP_NV, TRANSPOSED, true>(depth, a, ldw, b + d, ldb, g + i * ldg + d, ldg);
      else
        micro_kernel<T, 1, TRANSPOSED, true>(depth, a, ldw, b + d, ldb, g + i * ldg + d, ldg);
    }
    d += whole ? kPanel<T> : kWidth<T>;
  }
}

template <class T>
void gemm_rows(const T* w, int64_t ldw, int64_t rows, int64_t columns, const T* y, int64_t ldy, int64_t width, T* dx,
               int64_t ldx) {
  gemm_accumulate<T, false>(w, ldw, rows, columns, y, ldy, width, dx, ldx);
}

template <class T>
void gemm_columns(const T* w, int64_t ldw, int64_t rows, int64_t columns, const T* x, int64_t ldx, int64_t width, T* dy,
                  int64_t ldy) {
  gemm_accumulate<T, true>(w, ldw, columns, rows, x, ldx, width, dy, ldy);
}
