// Powers of two in one instruction.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

// 2**x with a relative error of 2**-22 (PTX), which fp16 and bf16 round away; 0 below 2**-126.
__device__ __forceinline__ float exp2Fast(float x) {
#ifdef LLMEXPORT_EMULATED
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace llmexport
