// What every kernel includes: CUDA, or the CPU emulator in its place.
//
// Kernels are launched by launch(), declare shared memory by SHARED_ARRAY and DYNAMIC_SHARED, and
// leave PTX to the headers of this folder; then the same source runs on both.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

#ifdef LLMEXPORT_EMULATED
#include "cpu/emulator.h"
#else
#include <cuda_runtime.h>

#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace llmexport {

// With an attribute, or with none if it is null.
template <class... P, class... A>
cudaError_t launchWith(cudaLaunchAttribute* attribute, void (*kernel)(P...), LaunchPlan const& plan,
                       cudaStream_t stream, A... args) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (plan.sharedBytes > kWithoutAsking) {
    auto const error = cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(plan.sharedBytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = plan.grid;
  config.blockDim = plan.block;
  config.dynamicSmemBytes = plan.sharedBytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), LaunchPlan const& plan, cudaStream_t stream, A... args) {
  return launchWith(nullptr, kernel, plan, stream, args...);
}

}  // namespace llmexport
#endif
