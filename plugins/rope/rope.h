// Rotary position embedding; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct RopeSizes {
  int64_t B, H, T, D, R;
};

struct RopePlan {
  LaunchPlan launch;
  int width;  // pairs that a thread rotates at a time
};

// For sizes of at least one element each.
RopePlan ropePlan(RopeSizes const& sizes, Dtype dtype, bool pointersAligned);

// y, of x's shape, may be x itself.
cudaError_t rope(Dtype dtype, RopeSizes const& sizes, bool interleaved, void const* x,
                 void const* cos, void const* sin, void* y, cudaStream_t stream);

}  // namespace llmexport
