// The delta rule whose state decays channel by channel; its meaning is in __init__.py.
#pragma once

#include "gated_delta_rule/delta_rule.h"

namespace llmexport {

struct KimiDeltaRuleSizes {
  int64_t B, T, H, D, V;
};

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
DeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& sizes, Dtype dtype, bool pointersAligned);

// Bytes that suffice for these sizes and all smaller ones.
size_t kimiDeltaRuleWorkspace(KimiDeltaRuleSizes const& sizes, Dtype dtype);

// `workspace` has the bytes above and is aligned to kVectorBytes.
cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& sizes,
                          DeltaRuleAttributes const& attributes, DeltaRuleTensors const& tensors,
                          void* workspace, cudaStream_t stream);

}  // namespace llmexport
