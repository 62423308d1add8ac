// What lets one text serve several compilers and instruction sets.
//
// FP_HD: functions that a host compiler and nvcc both compile.
// FP_NAMESPACE: a namespace per instruction set. A function compiled for a newer set must never be merged by the linker
// with its namesake for an older one, so everything that is not plain data lives in a namespace of its own.
#pragma once

#if defined(__CUDACC__)
#define FP_HD __host__ __device__
#else
#define FP_HD
#endif
#if !defined(FP_NAMESPACE)
#define FP_NAMESPACE common
#endif
#define FP_INLINE inline __attribute__((always_inline))
