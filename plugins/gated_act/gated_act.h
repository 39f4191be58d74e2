// act(gate) * up, element by element; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

enum class Activation { kSilu, kGeluTanh, kGeluErf, kSwigluClamped };

struct GatedActSizes {
  int64_t B, T, I;
  bool halves;  // gate and up are those of one tensor
  int64_t pitch = 0;  // from a row of gate and up to the next; 0 where each is dense
};

struct GatedActAttributes {
  Activation activation;
  float alpha, limit;  // of kSwigluClamped alone
};

// All [B, T, I]; y may be gate or up itself. Of halves gate is [B, T, 2 I] with up behind it; gate
// and up may be columns of one tensor. Then y is another tensor. `up` of halves is not read.
struct GatedActTensors {
  void const *gate, *up;
  void* y;
};

struct GatedActPlan {
  LaunchPlan launch;
  int width;  // elements of one access
};

bool gatedActServes(GatedActSizes const& sizes);

GatedActPlan gatedActPlan(GatedActSizes const& sizes, Dtype dtype, bool pointersAligned);

cudaError_t gatedAct(Dtype dtype, GatedActSizes const& sizes, GatedActAttributes const& attributes,
                     GatedActTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
