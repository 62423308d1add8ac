// The device as the kernels see it: places of threads, warps and blocks, shared memory, 16-byte accesses, 16-bit numbers.
//
// Compiled by nvcc, or by a host compiler with FP_EMULATED and a header `emulator.h` that offers the same names, so that
// the kernels run, step by step, on a machine without a GPU. A host compiler alone sees what starts kernels.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(FP_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#endif
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"
#include "options.h"

namespace flashpair {

constexpr int kLanes = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;  // of every kernel

#if !defined(FP_EMULATED)

using Stream = cudaStream_t;
using Status = cudaError_t;
inline const char* describe(Status status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#endif

// The host compiler, which decodes requests, sees no further than this.
#if defined(__CUDACC__)

#define FP_KERNEL(BLOCKS) __global__ void __launch_bounds__(kThreads, BLOCKS)
#define FP_DEVICE __device__ __forceinline__
#define FP_SHARED __shared__
#define FP_GRID_CONSTANT __grid_constant__  // read where it lies: no copy in local memory
#define FP_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#define FP_UNROLL _Pragma("unroll")

FP_DEVICE int thread_index() { return threadIdx.x; }
FP_DEVICE int block_index() { return int(blockIdx.x); }
FP_DEVICE void sync_block() { __syncthreads(); }
FP_DEVICE unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
FP_DEVICE int count_bits(unsigned bits) { return __popc(bits); }
FP_DEVICE int first_bit(unsigned bits) { return __ffs(int(bits)) - 1; }
// T: int, float or double
template <class T>
FP_DEVICE T shuffle_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}
template <class T>
FP_DEVICE T shuffle_up(T value, int lanes) {
  return __shfl_up_sync(0xffffffffu, value, lanes);
}
template <class T>
FP_DEVICE T shuffle_from(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
// Four neighbours at once, from memory into registers and back; memory is aligned to 16 bytes (8 for 16-bit numbers).
FP_DEVICE void load4(float (&to)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
FP_DEVICE void load4(double (&to)[4], const double* from) {
  const double2 a = reinterpret_cast<const double2*>(from)[0], b = reinterpret_cast<const double2*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}
FP_DEVICE void load4(int32_t (&to)[4], const int32_t* from) {
  const int4 v = *reinterpret_cast<const int4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
FP_DEVICE void store4(float* to, const float (&v)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
FP_DEVICE void store4(double* to, const double (&v)[4]) {
  reinterpret_cast<double2*>(to)[0] = make_double2(v[0], v[1]);
  reinterpret_cast<double2*>(to)[1] = make_double2(v[2], v[3]);
}
FP_DEVICE void store4(int32_t* to, const int32_t (&v)[4]) {
  *reinterpret_cast<int4*>(to) = make_int4(v[0], v[1], v[2], v[3]);
}
template <class H>  // Half or BFloat16
FP_DEVICE void store4(H* to, const H (&v)[4]) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(v[0].bits | unsigned(v[1].bits) << 16, v[2].bits | unsigned(v[3].bits) << 16);
}

FP_DEVICE uint16_t to_bits(float value, Half) { return __half_as_ushort(__float2half_rn(value)); }
FP_DEVICE uint16_t to_bits(float value, BFloat16) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
FP_DEVICE float to_float(Half v) { return __half2float(__ushort_as_half(v.bits)); }
FP_DEVICE float to_float(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }

// Starts `blocks` blocks of kThreads on a 1-D grid; nothing to do is no launch.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, Stream stream, Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (shared_bytes > 47 * 1024) {  // static shared memory counts too
    const Status status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) {
      (void)cudaGetLastError();  // the next launch is not to blame
      return status;
    }
  }
  kernel<<<dim3(unsigned(blocks)), dim3(kThreads), size_t(shared_bytes), stream>>>(arguments...);
  return cudaGetLastError();
}

#endif
#if defined(__CUDACC__) || defined(FP_EMULATED)

FP_DEVICE int lane_index() { return thread_index() % kLanes; }
FP_DEVICE int warp_index() { return thread_index() / kLanes; }

FP_DEVICE float narrow(float value, float) { return value; }
FP_DEVICE double narrow(double value, double) { return value; }
FP_DEVICE Half narrow(float value, Half) { return {to_bits(value, Half{})}; }
FP_DEVICE BFloat16 narrow(float value, BFloat16) { return {to_bits(value, BFloat16{})}; }
FP_DEVICE float widen(float value) { return value; }
FP_DEVICE double widen(double value) { return value; }
FP_DEVICE float widen(Half value) { return to_float(value); }
FP_DEVICE float widen(BFloat16 value) { return to_float(value); }

// The functions that double and float share; a float never takes a detour through double.
FP_DEVICE float exp_of(float x) { return expf(x); }
FP_DEVICE double exp_of(double x) { return exp(x); }
FP_DEVICE float log_of(float x) { return logf(x); }
FP_DEVICE double log_of(double x) { return log(x); }
FP_DEVICE float log1p_of(float x) { return log1pf(x); }
FP_DEVICE double log1p_of(double x) { return log1p(x); }
FP_DEVICE float tanh_of(float x) { return tanhf(x); }
FP_DEVICE double tanh_of(double x) { return tanh(x); }
FP_DEVICE float sqrt_of(float x) { return sqrtf(x); }
FP_DEVICE double sqrt_of(double x) { return sqrt(x); }
template <class T>
FP_DEVICE T infinity() {
  return T(INFINITY);
}
template <class T>
FP_DEVICE bool is_nan(T x) {
  return x != x;
}
template <class T>
FP_DEVICE T absolute(T x) {
  return x < 0 ? -x : x;
}
// The larger; a NaN in either does not win, so that ranges are of numbers.
FP_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
FP_DEVICE double larger(double a, double b) { return fmax(a, b); }
FP_DEVICE float smaller(float a, float b) { return fminf(a, b); }
FP_DEVICE double smaller(double a, double b) { return fmin(a, b); }

#endif

}  // namespace flashpair
