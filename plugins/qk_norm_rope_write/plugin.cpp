#include "qk_norm_rope/node.h"
#include "qk_norm_rope_write/qk_norm_rope_write.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kCos, kSin, kPastKey, kPastValue, kWriteIndices, kQWeight, kKWeight };
enum Outputs { kQuery, kKey, kValue };

QkNormRopeWriteSizes sizesOf(Sizes const& s, int64_t pitch) {
  return {qkNormRopeSizesOf(s, pitch), s['S']};
}

bool check(Sizes const& sizes, Values const&) {
  return qkNormRopeFits(sizesOf(sizes, kUnknown).step, "QkNormRopeWrite");
}

bool supports(Node const& node) {
  if (node.inputCount == kKWeight) {
    return refuse("QkNormRopeWrite: q_weight is given without k_weight");
  }
  return qkNormRopeWriteServes(sizesOf(node.sizes, node.pitch));
}

cudaError_t enqueue(Call const& call) {
  QkNormRopeTensors const step{call.input(kQ),       call.input(kK),      call.input(kV),
                               call.input(kCos),     call.input(kSin),    call.input(kQWeight),
                               call.input(kKWeight), call.output(kQuery), call.output(kKey),
                               call.output(kValue),  call.bias(kQ),       call.bias(kK),
                               call.bias(kV)};
  QkNormRopeWriteTensors const tensors{step, call.input(kPastKey), call.input(kPastValue),
                                       call.input<int32_t>(kWriteIndices)};
  return qkNormRopeWrite(call.dtype, sizesOf(call.sizes, call.pitch),
                         qkNormRopeAttributesOf(call.attributes), tensors, call.stream);
}

Registration const registration({
    "QkNormRopeWrite",
    "1",
    {joins({"q", "BTHQ"}),
     joins({"k", "BTGD"}),
     joins({"v", "BTGD"}),
     {"cos", "BTR"},
     {"sin", "BTR"},
     {"past_key", "BGSD"},
     {"past_value", "BGSD"},
     {"write_indices", "B", Element::kInt32},
     {"q_weight", "D", Element::kT, kOptional},
     {"k_weight", "D", Element::kT, kOptional}},
    {{"query", "BHTD"},
     {"key", "BGSD", Element::kT, false, kPastKey},
     {"value", "BGSD", Element::kT, false, kPastValue}},
    qkNormRopeAttributes(),
    enqueue,
    check,
    supports,
    nullptr,
    nullptr,
    true,
});

}  // namespace
}  // namespace llmexport
