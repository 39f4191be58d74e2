#pragma once

#include "common/gpu.cuh"

namespace llmexport {

// exp(g), by which a state decays token after token: near 1 rounded as exactly as fp32 can, as what
// such decays are off by adds up over all the tokens that a state remembers. expf is 2**-26 too
// large there on average, and up to 1.5 units of 2**-24 off (H200).
__device__ __forceinline__ float decayOf(float g) {
  return fabsf(g) < 0.5f ? 1.0f + expm1f(g) : expf(g);
}

}  // namespace llmexport
