// The grid and the block of a kernel: a pure function of shapes, to be tested without a GPU.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace llmexport {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest access of one thread
constexpr int64_t kMaxGridX = INT32_MAX;
constexpr int64_t kMaxGridY = 65535;

struct LaunchPlan {
  dim3 grid, block;
  size_t sharedBytes = 0;
  unsigned cluster = 1;  // blocks, side by side in x, that run at a time (common/cluster.cuh)
};

template <class A, class B>
__host__ __device__ constexpr int64_t ceilDiv(A a, B b) {
  return (int64_t(a) + b - 1) / b;
}

// Whether every pointer allows 16-byte accesses.
inline bool aligned(std::initializer_list<void const*> pointers) {
  for (void const* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % kVectorBytes != 0) return false;
  }
  return true;
}

}  // namespace llmexport
