// Gated delta rule, token by token or in chunks; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct GatedDeltaRuleSizes {
  int64_t B, T, G, H, D, V;
};

// Either the recurrence, or first what of every chunk needs no state, then the scan over chunks.
struct GatedDeltaRulePlan {
  bool chunked;
  int width;  // elements of one access of the recurrence
  LaunchPlan recurrence, prepare, scan;
};

// Whether there are kernels for matrices of this many rows or columns.
constexpr bool gatedDeltaRuleServes(int64_t size) {
  return size == 16 || size == 32 || size == 64 || size == 128;
}

// For sizes of at least one element each, but T.
GatedDeltaRulePlan gatedDeltaRulePlan(GatedDeltaRuleSizes const& sizes, Dtype dtype,
                                      bool pointersAligned);

// Bytes that suffice for these sizes and all smaller ones.
size_t gatedDeltaRuleWorkspace(GatedDeltaRuleSizes const& sizes, Dtype dtype);

struct GatedDeltaRuleTensors {
  void const *q, *k, *v;
  float const* g;
  void const* beta;
  float const* state;
  void* y;
  float* nextState;  // may be `state` itself
};

// `workspace`, of the bytes above, is aligned to kVectorBytes.
cudaError_t gatedDeltaRule(Dtype dtype, GatedDeltaRuleSizes const& sizes, float scale, bool l2Norm,
                           GatedDeltaRuleTensors const& tensors, void* workspace,
                           cudaStream_t stream);

}  // namespace llmexport
