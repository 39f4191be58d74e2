// Residual add and RMSNorm in one pass; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/row_plan.h"

namespace llmexport {

struct AddRmsNormSizes {
  int64_t B, T, C;
};

struct AddRmsNormAttributes {
  float epsilon, weightOffset;
  bool roundBeforeWeight;
};

struct AddRmsNormTensors {
  void const *x, *residual;  // [B, T, C]
  void const *weight, *inner;  // [C]; without an inner norm it is null
  void *y, *sum;             // [B, T, C]
};

bool addRmsNormServes(AddRmsNormSizes const& sizes);

cudaError_t addRmsNorm(Dtype dtype, AddRmsNormSizes const& sizes,
                       AddRmsNormAttributes const& attributes, AddRmsNormTensors const& tensors,
                       cudaStream_t stream);

}  // namespace llmexport
