// What launch plans ask of the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace llmexport {

struct Device {
  int processors;      // SMs
  size_t sharedBytes;  // that one block may have, with cudaFuncSetAttribute where it is over 48 KB
  int capability = 0;  // 90 for compute capability 9.0
};

// Of the current device. Asked when shapes change, not at every launch.
inline cudaError_t queryDevice(Device& device) {
#ifdef LLMEXPORT_EMULATED
  // The shared memory of sm_86, sm_89 and sm_120, few SMs, which a small test can fill, and the
  // instructions of sm_90a.
  device = {4, 99 * 1024, 90};
  return cudaSuccess;
#else
  int ordinal = 0, sharedBytes = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, ordinal);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&sharedBytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  }
  device.sharedBytes = size_t(sharedBytes);
  device.capability = 10 * major + minor;
  return error;
#endif
}

}  // namespace llmexport
