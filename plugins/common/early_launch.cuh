// A chain of launches in which a kernel may start while the one before it still runs (programmatic
// dependent launch, in code for sm_90 on; other code starts when the kernel before has ended).
//
// A kernel that is launched early calls waitForPrevious() in every block, before it touches memory
// that an earlier kernel of the chain writes or reads; after the call all earlier kernels have
// ended, as each of them waited in turn. The first kernel of a chain is launched by launch(). The
// next kernel may start when every block of this one has called letNextStart() or ended. A kernel
// that calls letNextStart() after waitForPrevious() promises the next one that all kernels before
// itself have ended.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

__device__ __forceinline__ void waitForPrevious() {
#ifdef LLMEXPORT_EMULATED
  emulator::Block::current().waitForPrevious(__LINE__);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void letNextStart() {
#ifdef LLMEXPORT_EMULATED
  emulator::Block::current().letNextStart();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class... P, class... A>
cudaError_t launchEarly(void (*kernel)(P...), LaunchPlan const& plan, cudaStream_t stream,
                        A... args) {
  return launchPrepared(true, kernel, plan, stream, args...);
}

}  // namespace llmexport
