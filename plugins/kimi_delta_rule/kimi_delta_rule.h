// The delta rule whose state decays channel by channel; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct KimiDeltaRuleSizes {
  int64_t B, T, H, D, V;
};

struct KimiDeltaRuleAttributes {
  float scale;
  bool l2Norm;
};

struct KimiDeltaRuleTensors {
  void const *q, *k, *v;
  float const* g;
  void const* beta;
  float const* state;
  void* y;
  float* nextState;  // may be `state` itself
};

struct KimiDeltaRulePlan {
  int width;  // elements of one access
  LaunchPlan recurrence;
};

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
KimiDeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& sizes, bool pointersAligned);

cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& sizes,
                          KimiDeltaRuleAttributes const& attributes,
                          KimiDeltaRuleTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
