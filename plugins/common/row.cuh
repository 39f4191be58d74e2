// A sum over the threads that row_plan.h gives a row, and which kernel a plan is of.
#pragma once

#include <type_traits>

#include "common/element.cuh"
#include "common/lanes.cuh"
#include "common/row_plan.h"

namespace llmexport {

// Calls inRegisters(how many vectors a thread keeps) or, of rows that are read twice,
// twoPass(elements of one access), each as a std::integral_constant.
template <class T, class InRegisters, class TwoPass>
cudaError_t withRowKernel(RowPlan const& plan, InRegisters inRegisters, TwoPass twoPass) {
  switch (plan.vectors) {
    case 1:
      return inRegisters(std::integral_constant<int, 1>{});
    case 2:
      return inRegisters(std::integral_constant<int, 2>{});
    case kRowMaxVectors:
      return inRegisters(std::integral_constant<int, kRowMaxVectors>{});
    default:
      return plan.width > 1 ? twoPass(std::integral_constant<int, kFullWidth<T>>{})
                            : twoPass(std::integral_constant<int, 1>{});
  }
}

// The sum over the blockDim.x threads of a row: a power of two up to a warp, or whole warps. It is
// added in fp32 by a tree of lanes and then one of warps: the order, and so the bits, are the same
// in every run. A kernel that sums twice calls it with `turn` 0 and then 1, as some warps may still
// read the first partial sums when others write the second.
__device__ __forceinline__ float sumOfRow(float value, int turn = 0) {
  int const lanes = blockDim.x < kWarp ? int(blockDim.x) : kWarp;
  value = sumOverLanes(value, lanes);
  if (blockDim.x <= kWarp) return value;
  constexpr int kMost = kRowMaxThreads / kWarp;
  SHARED_ARRAY(float, sums, 2 * kMost);
  float* const partial = sums + turn * kMost;
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  // Every warp adds the partial sums in the same order.
  float all = threadIdx.x % kWarp < blockDim.x / kWarp ? partial[threadIdx.x % kWarp] : 0.0f;
  return sumOverLanes(all, kWarp);
}

}  // namespace llmexport
