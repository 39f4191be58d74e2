// Powers of two and reciprocals in one instruction. Arguments and results below 2**-126 in
// magnitude count as 0.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

#ifdef LLMEXPORT_EMULATED
// x, but 0 if it is subnormal, as the instructions below take and give it.
inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
#endif

// 2**x with a relative error of 2**-22 (PTX), which fp16 and bf16 round away.
__device__ __forceinline__ float exp2Fast(float x) {
#ifdef LLMEXPORT_EMULATED
  return flushed(std::exp2(x));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x to one unit in the last place (PTX).
__device__ __forceinline__ float reciprocalFast(float x) {
#ifdef LLMEXPORT_EMULATED
  return flushed(1.0f / flushed(x));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace llmexport
