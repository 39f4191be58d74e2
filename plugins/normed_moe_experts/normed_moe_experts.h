// MoeExperts, and the AddRmsNorm of what it makes: the kernel that sums a token's experts has its
// whole row, and norms it. plugins/normed.py says what its plugins compute.
#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "moe_experts/moe_experts.h"

namespace llmexport {

struct NormedMoeExpertsAttributes {
  MoeExpertsAttributes experts;
  AddRmsNormAttributes norm;
};

// `experts` have no y. shared, residual, y and sum are [tokens, hidden], weight is [hidden];
// without a shared expert `shared` is null. `gate`, null if the shared expert has none, is a number
// for each token, `gatePitch` elements from one to the next.
struct NormedMoeExpertsTensors {
  MoeExpertsTensors experts;
  void const *residual, *weight, *shared, *gate;
  int64_t gatePitch;
  void *y, *sum;
};

bool normedMoeExpertsServes(MoeExpertsSizes const& sizes, MoeExpertsAttributes const& attributes);

// `workspace` is that of moeExperts.
cudaError_t normedMoeExperts(Dtype dtype, MoeExpertsSizes const& sizes,
                             NormedMoeExpertsAttributes const& attributes,
                             NormedMoeExpertsTensors const& tensors, void* workspace,
                             Device const& device, cudaStream_t stream);

}  // namespace llmexport
