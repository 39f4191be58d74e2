// RWKV-7's generalised delta rule, token by token; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

struct Wkv7Sizes {
  int64_t B, T, H, D, V;
};

struct Wkv7Tensors {
  void const *r, *w, *k;  // [B, T, H, D]
  void const* v;          // [B, T, H, V]
  void const *kappa, *a;  // [B, T, H, D]
  void const* present;    // [B, T]
  float const* state;     // [B, H, V, D]
  void* y;                // [B, T, H, V]
  float* nextState;       // may be `state` itself
};

bool wkv7Serves(Wkv7Sizes const& sizes);

// Sizes are at least 1, except T, which may be 0.
LaunchPlan wkv7Plan(Wkv7Sizes const& sizes);

cudaError_t wkv7(Dtype dtype, Wkv7Sizes const& sizes, Wkv7Tensors const& tensors,
                 cudaStream_t stream);

}  // namespace llmexport
