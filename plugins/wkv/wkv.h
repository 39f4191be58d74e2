// RWKV-4's decaying mean, token by token; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct WkvSizes {
  int64_t B, T, C;
};

// Sums over earlier tokens [B, C], and the largest exponent among their terms.
template <class F>
struct WkvStates {
  F *numerator, *denominator, *maximum;
};

struct WkvTensors {
  void const *key, *value;             // [B, T, C]
  void const* present;                 // [B, T]
  float const *timeDecay, *timeFirst;  // [C]
  WkvStates<float const> states;
  void* y;                // [B, T, C]
  WkvStates<float> next;  // each may be its state itself
};

bool wkvServes(WkvSizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
LaunchPlan wkvPlan(WkvSizes const& sizes);

cudaError_t wkv(Dtype dtype, WkvSizes const& sizes, WkvTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
