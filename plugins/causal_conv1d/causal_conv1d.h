// Depthwise causal convolution with a state; its meaning is in __init__.py.
#pragma once

#include "common/device.h"
#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

// Taps of a channel that there are kernels for.
constexpr int kFewestTaps = 2, kMostTaps = 4;

struct CausalConv1dSizes {
  int64_t B, T, C, K;
  int64_t pitch = 0;  // from a token of x to the next; 0 where x is dense
};

struct CausalConv1dAttributes {
  bool silu;  // otherwise there is no activation
};

struct CausalConv1dTensors {
  void const* x;       // [B, T, C], or columns of another tensor
  void const* weight;  // [C, 1, K]
  void const* state;   // [B, K - 1, C]
  int32_t const* end;  // [B]
  void const* bias;    // [C] or null
  void* y;             // [B, T, C]
  void* nextState;     // [B, K - 1, C], may be `state` itself
};

struct CausalConv1dPlan {
  LaunchPlan launch;
  int width;       // channels of one thread, and elements of one access
  int64_t length;  // tokens of one thread
  int64_t chunks;  // of so many tokens, in a row of the batch
};

// Whether weights [C, O, K] and a state of S inputs are those of such a convolution, as far as they
// are known; refuses in the name of `op`.
bool causalConv1dFits(char const* op, int64_t O, int64_t K, int64_t S);

// Refuses in the name of `op`.
bool causalConv1dServes(char const* op, CausalConv1dSizes const& sizes);

CausalConv1dPlan causalConv1dPlan(CausalConv1dSizes const& sizes, Dtype dtype, bool pointersAligned,
                                  Device const& device);

cudaError_t causalConv1d(Dtype dtype, CausalConv1dSizes const& sizes,
                         CausalConv1dAttributes const& attributes,
                         CausalConv1dTensors const& tensors, Device const& device,
                         cudaStream_t stream);

}  // namespace llmexport
