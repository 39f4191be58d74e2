// RMSNorm of every row times the activation of a gate; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/row_plan.h"

namespace llmexport {

struct GatedRmsNormAttributes {
  float epsilon;
  bool silu;  // otherwise the gate's sigmoid
  bool roundBeforeWeight;
};

// x, gate and y [rows, columns], weight [columns].
cudaError_t gatedRmsNorm(Dtype dtype, int64_t rows, int64_t columns,
                         GatedRmsNormAttributes const& attributes, void const* x, void const* gate,
                         void const* weight, void* y, cudaStream_t stream);

}  // namespace llmexport
