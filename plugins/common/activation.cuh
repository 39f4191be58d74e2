// Activations that several ops share, for results that are rounded to T.
#pragma once

#include "common/element.cuh"

namespace llmexport {

// factor * sigmoid(x)
template <class T>
__device__ __forceinline__ float sigmoidTimes(float factor, float x) {
  return divideFor<T>(factor, 1.0f + expFor<T>(-x));
}

}  // namespace llmexport
