#include "qk_norm_rope/node.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kCos, kSin, kQWeight, kKWeight };
enum Outputs { kQuery, kKey, kValue };

bool check(Sizes const& sizes, Values const&) {
  return qkNormRopeFits(qkNormRopeSizesOf(sizes, kUnknown));
}

bool supports(Node const& node) {
  if (node.inputCount == kKWeight) {
    return refuse("QkNormRope: q_weight is given without k_weight");
  }
  return qkNormRopeServes(qkNormRopeSizesOf(node.sizes, node.pitch));
}

cudaError_t enqueue(Call const& call) {
  QkNormRopeTensors const tensors{call.input(kQ),       call.input(kK),      call.input(kV),
                                  call.input(kCos),     call.input(kSin),    call.input(kQWeight),
                                  call.input(kKWeight), call.output(kQuery), call.output(kKey),
                                  call.output(kValue)};
  return qkNormRope(call.dtype, qkNormRopeSizesOf(call.sizes, call.pitch),
                    qkNormRopeAttributesOf(call.attributes), tensors, call.stream);
}

Registration const registration({
    "QkNormRope",
    "1",
    {joins({"q", "BTHQ"}),
     joins({"k", "BTGD"}),
     joins({"v", "BTGD"}),
     {"cos", "BTR"},
     {"sin", "BTR"},
     {"q_weight", "D", Element::kT, kOptional},
     {"k_weight", "D", Element::kT, kOptional}},
    {{"query", "BHTD"}, {"key", "BGTD"}, {"value", "BGTD"}},
    qkNormRopeAttributes(),
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
