// The facts of a GPU that launch plans depend on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace llmexport {

// Shared memory that a block may have on every architecture: sm_86, sm_89 and sm_120 have no more.
constexpr size_t kLeastSharedBytes = 99 * 1024;

struct Device {
  int processors;      // SMs
  size_t sharedBytes;  // that one block may have
  int capability = 0;  // 90 for compute capability 9.0
};

// Reads the current device. Plugins call it when shapes change, not at every launch.
inline cudaError_t queryDevice(Device& device) {
#ifdef LLMEXPORT_EMULATED
  // Few SMs, which a small test can fill, and the instructions of sm_90a.
  device = {4, kLeastSharedBytes, 90};
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
