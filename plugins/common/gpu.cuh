// CUDA, or the CPU emulator in its place: every kernel includes this file.
//
// Kernels are launched by launch(), declare shared memory by SHARED_ARRAY and DYNAMIC_SHARED, and
// leave PTX to the headers of this folder; then the same source runs on both.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

#ifdef LLMEXPORT_EMULATED
#include <cstring>

#include "cpu/emulator.h"
#else
#include <cuda_runtime.h>

#include <map>
#include <utility>

#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace llmexport {

// Lets `kernel` have all shared memory that a block may have on the current device, and sets `ptx`
// to the architecture that the kernel's code was compiled for: 90 even where a later GPU runs it.
//
// CUDA is asked once for each host thread, kernel and device. All threads set the same limit, so
// that none lowers it before another's launch.
inline cudaError_t prepareKernel(void const* kernel, int& ptx) {
  thread_local std::map<std::pair<void const*, int>, int> prepared;
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  auto const found = prepared.find({kernel, device});
  if (found != prepared.end()) return ptx = found->second, cudaSuccess;
  cudaFuncAttributes its{};
  error = cudaFuncGetAttributes(&its, kernel);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 bytes - static_cast<int>(its.sharedSizeBytes));
  }
  if (error == cudaSuccess) prepared[{kernel, device}] = ptx = its.ptxVersion;
  return error;
}

// Launches a kernel: early, as common/early_launch.cuh says, if `early` and the kernel's code has
// the wait. If the driver refuses an early launch, as some have under capture, the kernel is
// launched like any other.
template <class... P, class... A>
cudaError_t launchPrepared(bool early, void (*kernel)(P...), LaunchPlan const& plan,
                           cudaStream_t stream, A... args) {
  constexpr int kFirstWithWait = 90;
  int ptx = 0;
  cudaError_t const error = prepareKernel(reinterpret_cast<void const*>(kernel), ptx);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  unsigned const others = plan.cluster > 1;
  if (others) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {plan.cluster, 1, 1};
  }
  attributes[others].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[others].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = plan.grid;
  config.blockDim = plan.block;
  config.dynamicSmemBytes = plan.sharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = others + (early && ptx >= kFirstWithWait);
  cudaError_t const launched = cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
  if (launched == cudaSuccess || config.numAttrs == others) return launched;
  cudaGetLastError();  // clears the error, which the caller would find
  config.numAttrs = others;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

}  // namespace llmexport
#endif

namespace llmexport {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), LaunchPlan const& plan, cudaStream_t stream, A... args) {
  return launchPrepared(false, kernel, plan, stream, args...);
}

// From memory of the GPU to other memory of it, in the order of the stream.
inline cudaError_t copyBytes(void* to, void const* from, int64_t bytes, cudaStream_t stream) {
#ifdef LLMEXPORT_EMULATED
  (void)stream;
  emulator::finishLaunches();
  std::memcpy(to, from, size_t(bytes));
  return cudaSuccess;
#else
  return cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream);
#endif
}

}  // namespace llmexport
