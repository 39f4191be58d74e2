#include "qk_norm_rope/qk_norm_rope.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kCos, kSin, kQWeight, kKWeight };
enum Outputs { kQuery, kKey, kValue };
enum Attributes { kInterleaved, kEpsilon, kWeightOffset, kRoundBeforeWeight, kNormFirst };

QkNormRopeSizes sizesOf(Sizes const& s) {
  return {s['B'], s['T'], s['H'], s['G'], s['D'], s['R'], s['Q']};
}

QkNormRopeAttributes attributesOf(Values const& values) {
  return {values[kInterleaved].integer != 0, values[kEpsilon].real, values[kWeightOffset].real,
          values[kRoundBeforeWeight].integer != 0, values[kNormFirst].integer != 0};
}

bool check(Sizes const& sizes, Values const&) { return qkNormRopeFits(sizesOf(sizes)); }

bool supports(Node const& node) {
  if (node.inputCount == kKWeight) {
    return refuse("QkNormRope: q_weight is given without k_weight");
  }
  return qkNormRopeServes(sizesOf(node.sizes));
}

cudaError_t enqueue(Call const& call) {
  QkNormRopeTensors const tensors{call.input(kQ),      call.input(kK),       call.input(kV),
                                  call.input(kCos),    call.input(kSin),     call.input(kQWeight),
                                  call.input(kKWeight), call.output(kQuery), call.output(kKey),
                                  call.output(kValue)};
  return qkNormRope(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
                    call.stream);
}

Registration const registration({
    "QkNormRope",
    {{"q", "BTHQ"},
     {"k", "BTGD"},
     {"v", "BTGD"},
     {"cos", "BTR"},
     {"sin", "BTR"},
     {"q_weight", "D", Element::kT, kOptional},
     {"k_weight", "D", Element::kT, kOptional}},
    {{"query", "BHTD"}, {"key", "BGTD"}, {"value", "BGTD"}},
    {{"interleaved", Kind::kBool},
     {"epsilon", Kind::kFloat},
     {"weight_offset", Kind::kFloat},
     {"round_before_weight", Kind::kBool},
     {"norm_first", Kind::kBool}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
