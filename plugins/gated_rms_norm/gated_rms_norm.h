// RMSNorm of every row times the activation of a gate; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/row_plan.h"

namespace llmexport {

struct GatedRmsNormSizes {
  int64_t B, T, H, D;
  int64_t pitch = 0;  // from a token of the gate to the next; 0 where it is dense
};

struct GatedRmsNormAttributes {
  float epsilon;
  bool silu;  // otherwise the gate's sigmoid
  bool roundBeforeWeight;
};

struct GatedRmsNormTensors {
  void const *x, *gate;  // [B, T, H, D]; the gate may be columns of another tensor
  void const* weight;    // [D]
  void* y;               // [B, T, H, D]
};

bool gatedRmsNormServes(GatedRmsNormSizes const& sizes);

cudaError_t gatedRmsNorm(Dtype dtype, GatedRmsNormSizes const& sizes,
                         GatedRmsNormAttributes const& attributes,
                         GatedRmsNormTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
