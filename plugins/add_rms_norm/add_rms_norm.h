// Residual add and RMSNorm in one pass; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/row_plan.h"

namespace llmexport {

struct AddRmsNormAttributes {
  float epsilon, weightOffset;
  bool roundBeforeWeight;
};

// x, residual, y and sum [rows, columns], weight [columns].
cudaError_t addRmsNorm(Dtype dtype, int64_t rows, int64_t columns,
                       AddRmsNormAttributes const& attributes, void const* x, void const* residual,
                       void const* weight, void* y, void* sum, cudaStream_t stream);

}  // namespace llmexport
