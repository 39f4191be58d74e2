// Elements and vectors of elements: access, conversion, arithmetic that rounds where torch does.
#pragma once

#include <type_traits>

#include "common/gpu.cuh"

namespace llmexport {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

template <class T>
constexpr int kFullWidth = kVectorBytes / sizeof(T);

template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load(T const* from) {
  return *reinterpret_cast<Vector<T, kCount> const*>(from);
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* to, Vector<T, kCount> const& value) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = value;
}

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(Half x) { return __half2float(x); }
__device__ __forceinline__ float toFloat(Bfloat16 x) { return __bfloat162float(x); }

// To nearest, ties to even, as torch does.
template <class T>
__device__ __forceinline__ T fromFloat(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <class T>
__device__ __forceinline__ float rounded(float x) {
  return toFloat(fromFloat<T>(x));
}

// exp and division for results that are rounded to T. For fp32 expf (at most 2 units in the last
// place) and division as IEEE rounds it; for fp16 and bf16 __expf (2 + 1.17 |x| units: under 2**-16
// of it up to |x| = 88) and __fdividef (2 units; 0 for a divisor above 2**126, so that silu of a
// bf16 below -87.3 is 0), which is less than their own rounding, 2**-11 and 2**-8.
template <class T>
__device__ __forceinline__ float expFor(float x) {
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return __expf(x);
  }
}

template <class T>
__device__ __forceinline__ float divideFor(float a, float b) {
  if constexpr (sizeof(T) == 4) {
    return a / b;
  } else {
    return __fdividef(a, b);
  }
}

}  // namespace llmexport
