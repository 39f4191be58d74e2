#include "causal_conv1d/causal_conv1d.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kWeight, kState, kEnd, kBias };
enum Outputs { kY, kNextState };
enum Attributes { kActivation };
enum Activations { kNone, kSilu };

CausalConv1dSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['C'], s['K']}; }

CausalConv1dAttributes attributesOf(Values const& values) {
  return {values[kActivation].integer == kSilu};
}

bool check(Sizes const& sizes, Values const&) {
  int64_t const O = sizes['O'], K = sizes['K'], S = sizes['S'];
  if (O != kUnknown && O != 1) {
    return refuse("CausalConv1d: weight has %lld inputs for each channel, not 1", (long long)O);
  }
  if (K == kUnknown || S == kUnknown || S == K - 1) return true;
  return refuse("CausalConv1d: state has S = %lld inputs, but weight K = %lld taps, not S + 1",
                (long long)S, (long long)K);
}

bool supports(Node const& node) { return causalConv1dServes(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  CausalConv1dTensors const tensors{call.input(kX),     call.input(kWeight),
                                    call.input(kState), call.input<int32_t>(kEnd),
                                    call.input(kBias),  call.output(kY),
                                    call.output(kNextState)};
  return causalConv1d(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
                      call.device, call.stream);
}

Registration const registration({
    "CausalConv1d",
    {{"x", "BTC"},
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
