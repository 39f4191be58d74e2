// What the programs of this folder give to kernels.
#pragma once

#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/gpu.cuh"

// Memory of the machine that runs the kernels, of exactly `size` elements.
template <class T>
struct Array {
  T* data = nullptr;
  size_t size;
  explicit Array(std::vector<T> const& host) : size(host.size()) {
#ifdef LLMEXPORT_EMULATED
    if (posix_memalign(reinterpret_cast<void**>(&data), 16, size * sizeof(T))) std::abort();
    std::memcpy(data, host.data(), size * sizeof(T));
#else
    cudaMalloc(&data, size * sizeof(T));
    cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice);
#endif
  }
  ~Array() {
#ifdef LLMEXPORT_EMULATED
    std::free(data);
#else
    cudaFree(data);
#endif
  }
  std::vector<T> host() const {
    std::vector<T> out(size);
#ifdef LLMEXPORT_EMULATED
    std::memcpy(out.data(), data, size * sizeof(T));
#else
    cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost);
#endif
    return out;
  }
};
