// Depthwise causal convolution with a state; its meaning is in __init__.py.
#pragma once

#include "common/device.h"
#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

// Taps of a channel that there are kernels for.
constexpr int64_t kConvFewestTaps = 2, kConvMostTaps = 4;
constexpr int64_t kConvMostChannels = kMaxGridY * kWarp;  // a block takes a warp of them or more

struct CausalConv1dSizes {
  int64_t B, T, C, K;
};

struct CausalConv1dPlan {
  LaunchPlan launch;
  int width;       // channels of one thread, and elements of one access
  int64_t length;  // tokens of one thread
  int64_t chunks;  // of so many tokens, in a row of the batch
};

CausalConv1dPlan causalConv1dPlan(CausalConv1dSizes const& sizes, Dtype dtype, bool pointersAligned,
                                  Device const& device);

struct CausalConv1dTensors {
  void const *x, *weight, *state, *bias;  // bias may be null
  void *y, *nextState;                    // nextState may be state itself
};

// x and y [B, T, C], weight [C, K], state and nextState [B, K - 1, C], bias [C].
cudaError_t causalConv1d(Dtype dtype, CausalConv1dSizes const& sizes, bool silu,
                         CausalConv1dTensors const& tensors, Device const& device,
                         cudaStream_t stream);

}  // namespace llmexport
