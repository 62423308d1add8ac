// A 128 by 128 tile of X Y^T by tensor cores, from 16-bit embeddings, accumulated in float32 (sm_80 and later).
//
// Both operands come through shared memory in kMmaStages asynchronous stages of kMmaDepth features; 16-byte chunks are
// swizzled so that neither the copies nor ldmatrix meet bank conflicts. The product ends in shared memory, where the
// epilogue reads it in strips.
#pragma once

#include "strip_cuda.h"

namespace flashpair {

constexpr int kMmaRows = 128, kMmaColumns = kTileColumns, kMmaDepth = 32, kMmaStages = 4;
constexpr int kChunk = 8;  // 16-bit numbers in 16 bytes
constexpr int kStageBytes = (kMmaRows + kMmaColumns) * kMmaDepth * 2;
constexpr int kMmaSharedBytes = kMmaRows * kSharedRow * 4;
static_assert(kMmaStages * kStageBytes <= kMmaSharedBytes, "the stages share the memory of the product");
// Eight warps, two along the rows and four along the columns, each with 64 by 32 of the product.
constexpr int kWarpsDown = 2, kWarpRows = kMmaRows / kWarpsDown, kWarpColumns = kMmaColumns / (kWarps / kWarpsDown);
constexpr int kMmaDown = kWarpRows / 16, kMmaAcross = kWarpColumns / 8;

#if !defined(FP_EMULATED) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
// 16 bytes from global to shared memory without waiting; bytes beyond `valid` become zero.
FP_DEVICE void copy16_async(void* to, const void* from, int valid) {
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
}
FP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the committed groups are under way.
template <int N>
FP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Four 8 by 8 matrices of 16-bit numbers: lane l names row l % 8 of matrix l / 8 and receives, of each matrix, the two
// numbers from column 2 (l % 4) of row l / 4.
FP_DEVICE void load_matrices(unsigned (&out)[4], const void* row) {
  const unsigned address = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
// c (16 x 8) += a (16 x 16) b (16 x 8).
FP_DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FP_DEVICE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Place of a chunk in a stage: rows of four chunks, of which every second pair of rows is rotated.
FP_DEVICE int chunk_at(int row, int chunk) { return row * (kMmaDepth / kChunk) + (chunk ^ ((row >> 1) & 3)); }

// One operand of the stages: a thread copies the same chunk of every kStep-th row in each of them. Rows from `end` on and
// features from `features` on become zero; where nothing is valid, nothing is read.
template <class Input>
struct StageLoader {
  static constexpr int kChunks = kMmaDepth / kChunk, kStep = kThreads / kChunks, kCopies = kMmaRows / kStep;
  const Input* from;  // of the first copy
  int64_t stride;
  int at;        // of the first copy in a stage; a chunk is rotated alike kStep rows below
  int rows;      // left from the first copy's row on
  int features;  // left from this thread's chunk on

  FP_DEVICE StageLoader(const Input* base, int64_t stride, int first, int end, int depth) : stride(stride) {
    const int row = thread_index() / kChunks, chunk = thread_index() % kChunks;
    from = base + (first + row) * stride + chunk * kChunk;
    at = chunk_at(row, chunk) * kChunk, rows = end - first - row, features = depth - chunk * kChunk;
  }
  // Copies the next kMmaDepth features.
  FP_DEVICE void load(uint16_t* stage) {
    const int valid = features <= 0 ? 0 : features < kChunk ? features * 2 : 16;
    FP_UNROLL
    for (int n = 0; n < kCopies; ++n)
      copy16_async(stage + at + n * kStep * kMmaDepth, from + n * kStep * stride, n * kStep < rows ? valid : 0);
    from += kMmaDepth, features -= kMmaDepth;
  }
};

// The tile of rows from `row` and columns from `column` on, as (kMmaRows, kSharedRow) floats in `shared`.
template <class Input>
FP_DEVICE void multiply_tile(const EmbeddingSource<Input>& source, int row, int end_b, int column, int end_n,
                             char* shared) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const int lane = lane_index(), warp_row = warp_index() % kWarpsDown * kWarpRows;
  const int warp_column = warp_index() / kWarpsDown * kWarpColumns;
  const int steps = (source.features + kMmaDepth - 1) / kMmaDepth;
  auto stage_of = [&](int step) { return reinterpret_cast<uint16_t*>(shared + step % kMmaStages * kStageBytes); };
  StageLoader<Input> x_loader(source.x, source.stride_xb, row, end_b, source.features);
  StageLoader<Input> y_loader(source.y, source.stride_yn, column, end_n, source.features);
  auto load = [&](int step) {
    if (step < steps) {
      x_loader.load(stage_of(step));
      y_loader.load(stage_of(step) + kMmaRows * kMmaDepth);
    }
    commit_copies();
  };
  float c[kMmaDown][kMmaAcross][4];
  FP_UNROLL
  for (int m = 0; m < kMmaDown; ++m) FP_UNROLL
  for (int n = 0; n < kMmaAcross; ++n) FP_UNROLL
  for (int k = 0; k < 4; ++k) c[m][n][k] = 0;
  // Of the first matrices that this lane names; 16 rows below a chunk is rotated alike, and two chunks on is one bit.
  const int x_at = chunk_at(warp_row + lane % 16, lane / 16) * kChunk;
  const int y_at = kMmaRows * kMmaDepth + chunk_at(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2) * kChunk;
  for (int step = 0; step < kMmaStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kMmaStages - 2>();
    sync_block();  // this step's stage has arrived for all, and nobody reads the one that is loaded next
    load(step + kMmaStages - 1);
    const uint16_t* stage = stage_of(step);
    FP_UNROLL
    for (int depth = 0; depth < kMmaDepth / 16; ++depth) {
      unsigned a[kMmaDown][4], b[kMmaAcross / 2][4];
      FP_UNROLL
      for (int m = 0; m < kMmaDown; ++m)
        load_matrices(a[m], stage + (x_at ^ (depth * 2 * kChunk)) + m * 16 * kMmaDepth);
      FP_UNROLL
      for (int n = 0; n < kMmaAcross / 2; ++n)
        load_matrices(b[n], stage + (y_at ^ (depth * 2 * kChunk)) + n * 16 * kMmaDepth);
      FP_UNROLL
      for (int m = 0; m < kMmaDown; ++m) FP_UNROLL
      for (int n = 0; n < kMmaAcross; ++n)
        multiply_add(c[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1], Input{});
    }
  }
  wait_copies<0>();
  sync_block();  // the product takes the place of the stages
  float* product = reinterpret_cast<float*>(shared);
  FP_UNROLL
  for (int m = 0; m < kMmaDown; ++m) FP_UNROLL
  for (int n = 0; n < kMmaAcross; ++n) {
    float* at = product + (warp_row + m * 16 + lane / 4) * kSharedRow + warp_column + n * 8 + lane % 4 * 2;
    at[0] = c[m][n][0], at[1] = c[m][n][1];
    at[8 * kSharedRow] = c[m][n][2], at[8 * kSharedRow + 1] = c[m][n][3];
  }
  sync_block();
#endif
}

}  // namespace flashpair
