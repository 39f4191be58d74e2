// Copies from global to shared memory that a thread starts and later waits for (sm_80 on).
#pragma once

#include "common/gpu.cuh"

#ifndef LLMEXPORT_EMULATED
namespace llmexport {

// Starts to copy 16 bytes; both addresses are aligned to 16. Writes zeros and reads nothing if not
// `valid`.
__device__ __forceinline__ void copyAsync16(void* to, void const* from, bool valid = true) {
  auto const shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void waitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace llmexport
#endif
