#include "causal_conv1d/causal_conv1d.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kWeight, kState, kEnd, kBias };
enum Outputs { kY, kNextState };
enum Attributes { kActivation };
enum Activations { kNone, kSilu };

CausalConv1dSizes sizesOf(Node const& node) {
  Sizes const& s = node.sizes;
  return {s['B'], s['T'], s['C'], s['K'], node.pitch};
}

CausalConv1dAttributes attributesOf(Values const& values) {
  return {values[kActivation].integer == kSilu};
}

bool check(Sizes const& s, Values const&) {
  return causalConv1dFits("CausalConv1d", s['O'], s['K'], s['S']);
}

bool supports(Node const& node) { return causalConv1dServes("CausalConv1d", sizesOf(node)); }

cudaError_t enqueue(Call const& call) {
  CausalConv1dTensors const tensors{call.input(kX),     call.input(kWeight),
                                    call.input(kState), call.input<int32_t>(kEnd),
                                    call.input(kBias),  call.output(kY),
                                    call.output(kNextState)};
  return causalConv1d(call.dtype, sizesOf(call), attributesOf(call.attributes), tensors,
                      call.device, call.stream);
}

Registration const registration({
    "CausalConv1d",
    "1",
    {joins({"x", "BTC"}),
     {"weight", "COK"},
     {"state", "BSC"},
     {"end", "B", Element::kInt32},
     {"bias", "C", Element::kT, kOptional}},
    {{"y", "BTC"}, {"next_state", "BSC"}},
    {{"activation", Kind::kChoice, {"none", "silu"}}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
