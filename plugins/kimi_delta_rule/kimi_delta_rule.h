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

// There are two ways, as GatedDeltaRule has them: token by token, or in chunks of 16.
struct KimiDeltaRulePlan {
  bool chunked;
  int width;  // elements of one access of the recurrence
  LaunchPlan recurrence, prepare, scan;
};

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
KimiDeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& sizes, Dtype dtype,
                                    bool pointersAligned);

// Bytes that suffice for these sizes and all smaller ones.
size_t kimiDeltaRuleWorkspace(KimiDeltaRuleSizes const& sizes, Dtype dtype);

// `workspace` has the bytes above and is aligned to kVectorBytes.

cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& sizes,
                          KimiDeltaRuleAttributes const& attributes,
                          KimiDeltaRuleTensors const& tensors, void* workspace,
                          cudaStream_t stream);

}  // namespace llmexport
