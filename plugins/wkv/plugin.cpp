#include "trt/op.h"
#include "wkv/wkv.h"

namespace llmexport {
namespace {

enum Inputs { kKey, kValue, kPresent, kTimeDecay, kTimeFirst, kNumerator, kDenominator, kMaximum };
enum Outputs { kY, kNextNumerator, kNextDenominator, kNextMaximum };

WkvSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['C']}; }

bool supports(Node const& node) { return wkvServes(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  WkvTensors const tensors{
      call.input(kKey),
      call.input(kValue),
      call.input(kPresent),
      call.input<float>(kTimeDecay),
      call.input<float>(kTimeFirst),
      {call.input<float>(kNumerator), call.input<float>(kDenominator), call.input<float>(kMaximum)},
      call.output(kY),
      {call.output<float>(kNextNumerator), call.output<float>(kNextDenominator),
       call.output<float>(kNextMaximum)}};
  return wkv(call.dtype, sizesOf(call.sizes), tensors, call.stream);
}

Registration const registration({
    "Wkv",
    "1",
    {{"key", "BTC"},
     {"value", "BTC"},
     {"present", "BT"},
     {"time_decay", "C", Element::kFloat32},
     {"time_first", "C", Element::kFloat32},
     {"numerator", "BC", Element::kFloat32},
     {"denominator", "BC", Element::kFloat32},
     {"maximum", "BC", Element::kFloat32}},
    {{"y", "BTC"},
     {"next_numerator", "BC", Element::kFloat32},
     {"next_denominator", "BC", Element::kFloat32},
     {"next_maximum", "BC", Element::kFloat32}},
    {},
    enqueue,
    nullptr,
    supports,
});

}  // namespace
}  // namespace llmexport
