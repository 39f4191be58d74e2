// act(gate) * up, element by element; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

enum class Activation { kSilu, kGeluTanh, kGeluErf, kSwigluClamped };

struct GatedActPlan {
  LaunchPlan launch;
  int width;  // elements of one access
};

GatedActPlan gatedActPlan(int64_t count, Dtype dtype, bool pointersAligned);

// `alpha` and `limit` are read by kSwigluClamped alone. y may be gate or up itself.
cudaError_t gatedAct(Dtype dtype, int64_t count, Activation activation, float alpha, float limit,
                     void const* gate, void const* up, void* y, cudaStream_t stream);

}  // namespace llmexport
