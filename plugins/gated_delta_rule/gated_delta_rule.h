// Gated delta rule, token by token or in chunks; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct GatedDeltaRuleSizes {
  int64_t B, T, G, H, D, V;
};

struct GatedDeltaRuleAttributes {
  float scale;
  bool l2Norm;
};

struct GatedDeltaRuleTensors {
  void const *q, *k, *v;
  float const* g;
  void const* beta;
  float const* state;
  void* y;
  float* nextState;  // may be `state` itself
};

// There are two ways: token by token (`recurrence`); or `prepare` computes for all chunks at once
// whatever needs no state, and `scan` carries the state through them.
struct GatedDeltaRulePlan {
  bool chunked;
  int width;  // elements of one access of the recurrence
  LaunchPlan recurrence, prepare, scan;
};

bool gatedDeltaRuleFits(GatedDeltaRuleSizes const& sizes);
bool gatedDeltaRuleServes(GatedDeltaRuleSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
GatedDeltaRulePlan gatedDeltaRulePlan(GatedDeltaRuleSizes const& sizes, Dtype dtype,
                                      bool pointersAligned);

// Bytes that suffice for these sizes and all smaller ones.
size_t gatedDeltaRuleWorkspace(GatedDeltaRuleSizes const& sizes, Dtype dtype);

// `workspace` has the bytes above and is aligned to kVectorBytes.
cudaError_t gatedDeltaRule(Dtype dtype, GatedDeltaRuleSizes const& sizes,
                           GatedDeltaRuleAttributes const& attributes,
                           GatedDeltaRuleTensors const& tensors, void* workspace,
                           cudaStream_t stream);

}  // namespace llmexport
