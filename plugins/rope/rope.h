// Rotary position embedding; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct RopeSizes {
  int64_t B, H, T, D, R;
};

struct RopeAttributes {
  bool interleaved;
};

struct RopeTensors {
  void const *x, *cos, *sin;
  void* y;  // may be x itself
};

struct RopePlan {
  LaunchPlan launch;
  int width;  // pairs that a thread rotates at a time
};

bool ropeFits(RopeSizes const& sizes);
bool ropeServes(RopeSizes const& sizes);

// Sizes are at least 1.
RopePlan ropePlan(RopeSizes const& sizes, Dtype dtype, bool pointersAligned);

cudaError_t rope(Dtype dtype, RopeSizes const& sizes, RopeAttributes const& attributes,
                 RopeTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
