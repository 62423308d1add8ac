// Results below the smallest normal number become zero while a task runs: on some processors each of them costs a hundred
// times an ordinary one, and a softmax of trained embeddings is full of them (CLIP at B = 1024 took 28 times as long).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>

namespace flashpair {

class FlushedSubnormals {
 public:
  FlushedSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushedSubnormals() { _mm_setcsr(before_); }
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

 private:
  unsigned before_;
};

}  // namespace flashpair

#else

namespace flashpair {

struct FlushedSubnormals {
  FlushedSubnormals() {}
};

}  // namespace flashpair

#endif
