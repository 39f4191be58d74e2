// Gated delta rule, token by token or in chunks; its meaning is in __init__.py.
#pragma once

#include "gated_delta_rule/delta_rule.h"

namespace llmexport {

struct GatedDeltaRuleSizes {
  int64_t B, T, G, H, D, V;
};

bool gatedDeltaRuleFits(GatedDeltaRuleSizes const& sizes);
bool gatedDeltaRuleServes(GatedDeltaRuleSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
DeltaRulePlan gatedDeltaRulePlan(GatedDeltaRuleSizes const& sizes, Dtype dtype,
                                 bool pointersAligned);

// Bytes that suffice for these sizes and all smaller ones.
size_t gatedDeltaRuleWorkspace(GatedDeltaRuleSizes const& sizes, Dtype dtype);

// `workspace` has the bytes above and is aligned to kVectorBytes.
cudaError_t gatedDeltaRule(Dtype dtype, GatedDeltaRuleSizes const& sizes,
                           DeltaRuleAttributes const& attributes, DeltaRuleTensors const& tensors,
                           void* workspace, cudaStream_t stream);

}  // namespace llmexport
