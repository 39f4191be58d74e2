// Kernels of one chain of launches that start while the one before still runs (programmatic
// dependent launch, in code for sm_90 on; other code starts when it has ended).
//
// A kernel that is launched early calls waitForPrevious() in every block, before it touches what
// an earlier kernel of the chain wrote or reads; then all earlier ones have ended, as each waited
// in turn. The first of a chain is launched by launch(). A kernel whose blocks have all called
// letNextStart(), or ended, lets the next one start. One that calls it after waitForPrevious()
// promises the next one that what came before itself has ended.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

__device__ __forceinline__ void waitForPrevious() {
#ifdef LLMEXPORT_EMULATED
  emulator::Block::current().waitForPrevious();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void letNextStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class... P, class... A>
cudaError_t launchEarly(void (*kernel)(P...), LaunchPlan const& plan, cudaStream_t stream,
                        A... args) {
  return launchPrepared(true, kernel, plan, stream, args...);
}

}  // namespace llmexport
