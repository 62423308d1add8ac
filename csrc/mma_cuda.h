// A 128 by 128 tile of X Y^T by tensor cores, from 16-bit embeddings, accumulated in float32 (sm_80 and later).
//
// Both operands come through shared memory in kMmaStages asynchronous stages of kMmaDepth features; 16-byte chunks are
// swizzled so that neither the copies nor ldmatrix meet bank conflicts. The product ends in shared memory, where the
// epilogue reads it in strips.
#pragma once

#include "strip_cuda.h"

namespace flashpair {

constexpr int kMmaRows = 128, kMmaColumns = kTileColumns, kMmaDepth = 32, kMmaStages = 3;
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

// One operand's rows of a stage; rows from `end` on and features from `features` on become zero.
template <int ROWS, class Input>
FP_DEVICE void load_stage(uint16_t* stage, const Input* from, int64_t stride, int first, int end, int feature,
                          int features) {
  constexpr int chunks = kMmaDepth / kChunk;
  FP_UNROLL
  for (int n = 0; n < ROWS * chunks / kThreads; ++n) {
    const int place = n * kThreads + thread_index(), row = place / chunks, d = feature + place % chunks * kChunk;
    int valid = features - d < 0 || first + row >= end ? 0 : (features - d) * 2;
    valid = valid > 16 ? 16 : valid;
    const Input* source = valid ? from + int64_t(first + row) * stride + d : from;
    copy16_async(stage + chunk_at(row, place % chunks) * kChunk, source, valid);
  }
}

// The tile of rows from `row` and columns from `column` on, as (kMmaRows, kSharedRow) floats in `shared`.
template <class Input>
FP_DEVICE void multiply_tile(const EmbeddingSource<Input>& source, int row, int end_b, int column, int end_n,
                             char* shared) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const int lane = lane_index(), warp_row = warp_index() % kWarpsDown * kWarpRows;
  const int warp_column = warp_index() / kWarpsDown * kWarpColumns;
  const int steps = (source.features + kMmaDepth - 1) / kMmaDepth;
  auto stage_of = [&](int step) { return reinterpret_cast<uint16_t*>(shared + step % kMmaStages * kStageBytes); };
  auto load = [&](int step) {
    if (step < steps) {
      uint16_t* stage = stage_of(step);
      load_stage<kMmaRows>(stage, source.x, source.stride_xb, row, end_b, step * kMmaDepth, source.features);
      load_stage<kMmaColumns>(stage + kMmaRows * kMmaDepth, source.y, source.stride_yn, column, end_n, step * kMmaDepth,
                              source.features);
    }
    commit_copies();
  };
  float c[kMmaDown][kMmaAcross][4];
  FP_UNROLL
  for (int m = 0; m < kMmaDown; ++m) FP_UNROLL
  for (int n = 0; n < kMmaAcross; ++n) FP_UNROLL
  for (int k = 0; k < 4; ++k) c[m][n][k] = 0;
  for (int step = 0; step < kMmaStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    wait_copies<kMmaStages - 2>();
    sync_block();  // this step's stage has arrived for all, and nobody reads the one that is loaded next
    load(step + kMmaStages - 1);
    const uint16_t* x = stage_of(step);
    const uint16_t* y = x + kMmaRows * kMmaDepth;
    FP_UNROLL
    for (int depth = 0; depth < kMmaDepth / 16; ++depth) {
      unsigned a[kMmaDown][4], b[kMmaAcross / 2][4];
      FP_UNROLL
      for (int m = 0; m < kMmaDown; ++m)
        load_matrices(a[m], x + chunk_at(warp_row + m * 16 + lane % 16, depth * 2 + lane / 16) * kChunk);
      FP_UNROLL
      for (int n = 0; n < kMmaAcross / 2; ++n)
        load_matrices(b[n],
                      y + chunk_at(warp_column + n * 16 + lane % 8 + lane / 16 * 8, depth * 2 + lane / 8 % 2) * kChunk);
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
