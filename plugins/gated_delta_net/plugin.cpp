#include "gated_delta_net/gated_delta_net.h"

#include "causal_conv1d/causal_conv1d.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs {
  kMixed,
  kConvWeight,
  kConvState,
  kEnd,
  kA,
  kB,
  kPresent,
  kALog,
  kDtBias,
  kZ,
  kNormWeight,
  kState
};
enum Outputs { kGated, kNextConvState, kNextState };
enum Attributes { kScale, kL2Norm, kEpsilon, kActivation, kRoundBeforeWeight };
enum Activations { kSilu, kSigmoid };

GatedDeltaNetSizes sizesOf(Sizes const& s, int64_t pitch) {
  return {s['B'], s['T'], s['C'], s['H'], s['D'], s['V'], s['K'], pitch};
}

GatedDeltaNetAttributes attributesOf(Values const& values) {
  return {{values[kScale].real, values[kL2Norm].integer != 0},
          {values[kEpsilon].real, values[kActivation].integer == kSilu,
           values[kRoundBeforeWeight].integer != 0}};
}

bool check(Sizes const& sizes, Values const&) {
  return causalConv1dFits("GatedDeltaNet", sizes['O'], sizes['K'], sizes['S']) &&
         gatedDeltaNetFits(sizesOf(sizes, kUnknown));
}

bool supports(Node const& node) { return gatedDeltaNetServes(sizesOf(node.sizes, node.pitch)); }

size_t workspace(Node const& node) {
  return gatedDeltaNetWorkspace(sizesOf(node.sizes, node.pitch), node.dtype);
}

cudaError_t enqueue(Call const& call) {
  GatedDeltaNetTensors const tensors{call.input(kMixed),
                                     call.input(kConvWeight),
                                     call.input(kConvState),
                                     call.input<int32_t>(kEnd),
                                     call.input(kA),
                                     call.input(kB),
                                     call.input(kPresent),
                                     call.input(kALog),
                                     call.input(kDtBias),
                                     call.input(kZ),
                                     call.input(kNormWeight),
                                     call.input<float>(kState),
                                     call.output(kGated),
                                     call.output(kNextConvState),
                                     call.output<float>(kNextState)};
  return gatedDeltaNet(call.dtype, sizesOf(call.sizes, call.pitch), attributesOf(call.attributes),
                       tensors, call.workspace, call.device, call.stream);
}

Registration const registration({
    "GatedDeltaNet",
    "1",
    {joins({"mixed", "BTC"}),
     {"conv_weight", "COK"},
     {"conv_state", "BSC"},
     {"end", "B", Element::kInt32},
     joins({"a", "BTH"}),
     joins({"b", "BTH"}),
     {"present", "BT"},
     {"a_log", "H"},
     {"dt_bias", "H"},
     joins({"z", "BTHV"}),
     {"norm_weight", "V"},
     {"state", "BHDV", Element::kFloat32}},
    {{"gated", "BTHV"}, {"next_conv_state", "BSC"}, {"next_state", "BHDV", Element::kFloat32}},
    {{"scale", Kind::kFloat},
     {"l2_norm", Kind::kBool},
     {"epsilon", Kind::kFloat},
     {"activation", Kind::kChoice, {"silu", "sigmoid"}},
     {"round_before_weight", Kind::kBool}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
