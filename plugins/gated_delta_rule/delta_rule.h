// What delta rules share, whatever of the state decays.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct DeltaRuleAttributes {
  float scale;
  bool l2Norm;
};

struct DeltaRuleTensors {
  void const *q, *k, *v;
  float const* g;
  void const* beta;
  float const* state;
  void* y;
  float* nextState;  // may be `state` itself
  // Elements from one token to the next of q and k, and of v; y is dense.
  int64_t keyStride, valueStride;
};

// There are two ways: token by token (`recurrence`); or `prepare` computes for all chunks at once
// whatever needs no state, and `scan` carries the state through them.
struct DeltaRulePlan {
  bool chunked;
  int width;  // elements of one access of the recurrence
  LaunchPlan recurrence, prepare, scan;
};

}  // namespace llmexport
