// A gated delta rule with its convolution, its gates and its norm; its meaning is in __init__.py.
#pragma once

#include "common/device.h"
#include "gated_delta_rule/delta_rule.h"
#include "gated_rms_norm/gated_rms_norm.h"

namespace llmexport {

struct GatedDeltaNetSizes {
  int64_t B, T, C, H, D, V;
  int64_t K;  // taps of the convolution
  int64_t pitch = 0;  // from a token of mixed, a, b and z to the next; 0 where each is dense
};

struct GatedDeltaNetAttributes {
  DeltaRuleAttributes rule;
  GatedRmsNormAttributes norm;
};

// mixed, a, b and z may be columns of one tensor.
struct GatedDeltaNetTensors {
  void const* mixed;                   // [B, T, C]
  void const *convWeight, *convState;  // [C, 1, K], [B, K - 1, C]
  int32_t const* end;                  // [B]
  void const *a, *b, *present;         // [B, T, H], [B, T, H], [B, T]
  void const *aLog, *dtBias;           // [H]
  void const *z, *normWeight;          // [B, T, H, V], [V]
  float const* state;                  // [B, H, D, V]
  void* gated;                         // [B, T, H, V]
  void* nextConvState;                 // [B, K - 1, C], in other memory than `convState`
  float* nextState;                    // [B, H, D, V], may be `state` itself
};

// Either one kernel does all for one token a row (`decode`); or that of CausalConv1d comes first,
// `gates` makes decays and strengths for the kernels of GatedDeltaRule, and that of GatedRmsNorm
// comes behind.
struct GatedDeltaNetPlan {
  bool fused;
  int width;  // elements of one access of `decode`
  LaunchPlan decode, gates;
};

bool gatedDeltaNetFits(GatedDeltaNetSizes const& sizes);
bool gatedDeltaNetServes(GatedDeltaNetSizes const& sizes);

GatedDeltaNetPlan gatedDeltaNetPlan(GatedDeltaNetSizes const& sizes, bool pointersAligned,
                                    Device const& device);

// Bytes that suffice for these sizes and all smaller ones, on any device.
size_t gatedDeltaNetWorkspace(GatedDeltaNetSizes const& sizes, Dtype dtype);

// `workspace` has the bytes above and is aligned to kVectorBytes.
cudaError_t gatedDeltaNet(Dtype dtype, GatedDeltaNetSizes const& sizes,
                          GatedDeltaNetAttributes const& attributes,
                          GatedDeltaNetTensors const& tensors, void* workspace,
                          Device const& device, cudaStream_t stream);

}  // namespace llmexport
