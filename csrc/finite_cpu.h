// Whether all entries of an array are finite, by the bits of their exponents: those of infinities and NaN are all ones.
#pragma once

#include <cstdint>

namespace flashpair {

// `bytes` an entry; `exponent`: its exponent bits.
bool all_finite(const void* data, int64_t entries, int bytes, uint64_t exponent);

}  // namespace flashpair
