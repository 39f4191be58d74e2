// Barriers of some of a block's warps, or of all where they wait at different places.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

// Waits until `kThreads` threads, those of whole warps, have called this with the same `barrier`,
// from 1 to 15. Then they see each other's writes to shared memory.
#ifdef LLMEXPORT_EMULATED
template <int kThreads>
void syncWarps(int barrier, int line = __builtin_LINE()) {
  emulator::Block::current().warpBarrier(barrier, kThreads, line);
}
#else
template <int kThreads>
__device__ __forceinline__ void syncWarps(int barrier) {
  static_assert(kThreads % kWarp == 0);
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
#endif

}  // namespace llmexport
