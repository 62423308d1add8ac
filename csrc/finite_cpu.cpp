#include "finite_cpu.h"

namespace flashpair {
namespace {

template <class Bits>
bool all_finite(const Bits* data, int64_t entries, Bits exponent) {
  Bits found = 0;
  for (int64_t i = 0; i < entries; ++i) found |= Bits(-Bits((data[i] & exponent) == exponent));
  return !found;
}

}  // namespace

bool all_finite(const void* data, int64_t entries, int bytes, uint64_t exponent) {
  if (bytes == 2) return all_finite(static_cast<const uint16_t*>(data), entries, uint16_t(exponent));
  if (bytes == 4) return all_finite(static_cast<const uint32_t*>(data), entries, uint32_t(exponent));
  return all_finite(static_cast<const uint64_t*>(data), entries, exponent);
}

}  // namespace flashpair
