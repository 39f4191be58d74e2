// What the programs of this folder give to kernels, and hold their products against.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
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

// Two matrices of normal numbers: a [M, K], and b [N, K] or, row-major, [K, N].
template <class T>
struct Factors {
  int M, N, K;
  std::vector<T> a, b;
  Factors(int m, int n, int k) : M(m), N(n), K(k), a(m * k), b(n * k) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (auto* v : {&a, &b}) {
      for (auto& x : *v) x = T(normal(random));
    }
  }

  // Whether c [M, N] is a * b, by float64.
  bool give(std::vector<float> const& c, bool isRowMajorB) const {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) {
        double sum = 0;
        for (int k = 0; k < K; ++k) {
          sum += double(float(a[m * K + k])) * float(isRowMajorB ? b[k * N + n] : b[n * K + k]);
        }
        if (!(std::fabs(c[m * N + n] - sum) < 1e-4)) return false;
      }
    }
    return true;
  }
};
