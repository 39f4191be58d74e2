// Powers of two that bring rows of fp32 into the range of fp16.
#pragma once

#include "common/lanes.cuh"
#include "gated_delta_rule/tiles.cuh"

namespace llmexport {

// Whether rows must be scaled into the range of T: bf16 has the range of fp32, fp16 has not.
template <class T>
constexpr bool kScaled = std::is_same_v<T, Half>;

// Powers of two that bring two rows of accumulators into the range of T, and back.
struct RowScale {
  float down[2] = {1.0f, 1.0f}, up[2] = {1.0f, 1.0f};
};

template <int kCount>
__device__ __forceinline__ float largest(float const (&x)[kCount][4], int row) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    most = fmaxf(most, fmaxf(fabsf(x[i][2 * row]), fabsf(x[i][2 * row + 1])));
  }
  return most;
}

// The scale of each row by its largest element in all of `x`.
template <class T, int... kCounts>
__device__ __forceinline__ RowScale rowScale(float const (&... x)[kCounts][4]) {
  RowScale scale;
  if constexpr (kScaled<T>) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = 0.0f;
      ((most = fmaxf(most, largest(x, row))), ...);
      most = maxOverLanes(most, kQuad);
      // The scale is the exponent alone, or 1 if that has no inverse.
      constexpr uint32_t kOne = 0x3F800000, kExponent = 0x7F800000, kLargest = 0x7E800000;
      uint32_t up;
      memcpy(&up, &most, sizeof up);
      up &= kExponent;
      if (up == 0 || up > kLargest) up = kOne;
      uint32_t const down = 2 * kOne - up;
      memcpy(&scale.up[row], &up, sizeof up);
      memcpy(&scale.down[row], &down, sizeof down);
    }
  }
  return scale;
}

template <class T, int kCount>
__device__ __forceinline__ void scaleRows(float (&x)[kCount][4], float const (&by)[2]) {
  if constexpr (kScaled<T>) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][e] *= by[e / 2];
    }
  }
}

}  // namespace llmexport
