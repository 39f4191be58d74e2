#include "causal_conv1d/causal_conv1d.h"
#include "trt/op.h"

namespace llmexport {
namespace {

int32_t check(Sizes const& sizes, Values const&) {
  int64_t const O = sizes['O'], K = sizes['K'], S = sizes['S'];
  if (O != Sizes::kUnknown && O != 1) {
    return refuse("CausalConv1d: weight has %lld inputs for each channel, not 1", (long long)O);
  }
  if (K == Sizes::kUnknown || S == Sizes::kUnknown || S == K - 1) return 0;
  return refuse("CausalConv1d: state has S = %lld inputs, but weight K = %lld taps, not S + 1",
                (long long)S, (long long)K);
}

int32_t supports(Node const& node) {
  int64_t const K = node.sizes['K'];
  if (K != Sizes::kUnknown && (K < kConvFewestTaps || K > kConvMostTaps)) {
    return refuse("CausalConv1d: weight has K = %lld taps, the kernels are for %lld to %lld",
                  (long long)K, (long long)kConvFewestTaps, (long long)kConvMostTaps);
  }
  int32_t const error = checkProduct("CausalConv1d", node.sizes, "C", kConvMostChannels);
  return error ? error : checkProduct("CausalConv1d", node.sizes, "BT", kMaxGridX);
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  return causalConv1d(call.dtype, {s['B'], s['T'], s['C'], s['K']}, call.attributes[0].integer != 0,
                      {call.inputs[0], call.inputs[1], call.inputs[2], call.inputs[3],
                       call.outputs[0], call.outputs[1]},
                      call.device, call.stream);
}

Registration const registration({
    "CausalConv1d",
    {{"x", "BTC"}, {"weight", "COK"}, {"state", "BSC"}, {"bias", "C", Element::kT, kOptional}},
    {{"y", "BTC"}, {"next_state", "BSC"}},
    {{"activation", Kind::kChoice, {"none", "silu"}}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
