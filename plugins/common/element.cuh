// Elements and vectors of elements: access, conversion, arithmetic that rounds where torch does.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/exp2.cuh"

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
#ifdef LLMEXPORT_EMULATED
  // Which threads wrote what wgmma reads.
  emulator::Block::current().wrote(to, sizeof value);
#endif
}

// A vector's bits in whole registers, for a vector that is read ahead of a branch: of its elements
// the compiler would keep each in a register of its own.
template <class T, int kCount>
using Bits =
    std::conditional_t<sizeof(T) * kCount % sizeof(uint32_t) == 0,
                       Vector<uint32_t, sizeof(T) * kCount / sizeof(uint32_t)>, Vector<T, kCount>>;

template <int kCount, class T>
__device__ __forceinline__ Bits<T, kCount> loadBits(T const* from) {
  return *reinterpret_cast<Bits<T, kCount> const*>(from);
}

template <class T, int kCount>
__device__ __forceinline__ Bits<T, kCount> bitsOf(Vector<T, kCount> const& value) {
  Bits<T, kCount> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> fromBits(Bits<T, kCount> const& bits) {
  Vector<T, kCount> value;
  memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

// Stores to global memory by one instruction: the compiler would split the store of a vector that
// was put together element by element.
template <int kCount, class T>
__device__ __forceinline__ void storeWhole(T* to, Vector<T, kCount> const& value) {
#ifndef LLMEXPORT_EMULATED
  constexpr size_t kBytes = sizeof value;
  if constexpr (kBytes % 4 == 0) {
    uint32_t words[kBytes / 4];
    memcpy(words, &value, kBytes);
    if constexpr (kBytes == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
      return;
    } else if constexpr (kBytes == 4) {
      asm volatile("st.global.b32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
      return;
    }
  }
#endif
  store<kCount>(to, value);
}

__device__ __forceinline__ float toFloat(float x) { return x; }
__device__ __forceinline__ float toFloat(Half x) { return __half2float(x); }
__device__ __forceinline__ float toFloat(Bfloat16 x) { return __bfloat162float(x); }

// Conversions round to nearest, ties to even, as torch does. They take pairs: the GPU converts two
// values at once fast, but one alone as slowly as it takes exp.

// Two values as a pair of 16-bit T.
template <class T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, Half>) {
    __half2 const pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> fromFloats(float const (&values)[kCount]) {
  Vector<T, kCount> result;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.at[i] = values[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      uint32_t const pair = packed<T>(values[i], i + 1 < kCount ? values[i + 1] : 0.0f);
      memcpy(static_cast<void*>(result.at + i), &pair, (i + 1 < kCount ? 2 : 1) * sizeof(T));
    }
  }
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> addRounded(Vector<T, kCount> const& a,
                                                        Vector<T, kCount> const& b) {
  float sums[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) sums[j] = toFloat(a.at[j]) + toFloat(b.at[j]);
  return fromFloats<T>(sums);
}

template <class T>
__device__ __forceinline__ T fromFloat(float x) {
  return fromFloats<T, 1>({x}).at[0];
}

template <class T>
__device__ __forceinline__ float rounded(float x) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    // A bf16 is the upper half of a float.
    uint32_t const pair = packed<T>(0.0f, x);
    float result;
    memcpy(&result, &pair, sizeof result);
    return result;
  } else {
    return toFloat(fromFloat<T>(x));
  }
}

// exp and division for results that are rounded to T. fp32 has expf (at most 2 units in the last
// place) and division as IEEE rounds it. fp16 and bf16 have instructions of the GPU, whose errors
// are less than the rounding to T, 2**-11 and 2**-8. Their exp is exp2Fast of x log2(e): its
// relative error is under 2**-16 up to |x| = 88, and results below 2**-126 are 0. Their division is
// the product with a reciprocal: its error is 2 units in the last place, and a divisor above 2**126
// gives 0, so that silu of a bf16 below -87.3 is 0.
template <class T>
__device__ __forceinline__ float expFor(float x) {
  constexpr float kLog2OfE = 1.4426950408889634f;
  if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp2Fast(x * kLog2OfE);
  }
}

template <class T>
__device__ __forceinline__ float divideFor(float a, float b) {
  if constexpr (sizeof(T) == 4) {
    return a / b;
  } else {
    return a * reciprocalFast(b);
  }
}

}  // namespace llmexport
