// Memory of one call that a later call takes again: fresh pages cost a small batch more than its arithmetic.
#pragma once

#include <cstdint>

namespace flashpair {

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;  // at least what was asked for
};

// Uninitialised memory, aligned to 64 bytes; from any thread.
Block take_block(int64_t bytes);
void give_block(Block block);
// Gives back to the system what no call has; returns its size.
int64_t release_blocks();
// Not under AddressSanitizer, which would not see who writes past the end of a block.
bool blocks_are_kept();

}  // namespace flashpair
