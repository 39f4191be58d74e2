#include "gated_rms_norm/gated_rms_norm.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kGate, kWeight };
enum Outputs { kY };
enum Attributes { kEpsilon, kActivation, kRoundBeforeWeight };
enum Activations { kSilu, kSigmoid };

GatedRmsNormSizes sizesOf(Node const& node) {
  Sizes const& s = node.sizes;
  return {s['B'], s['T'], s['H'], s['D'], node.pitch};
}

GatedRmsNormAttributes attributesOf(Values const& values) {
  return {values[kEpsilon].real, values[kActivation].integer == kSilu,
          values[kRoundBeforeWeight].integer != 0};
}

bool supports(Node const& node) { return gatedRmsNormServes(sizesOf(node)); }

cudaError_t enqueue(Call const& call) {
  GatedRmsNormTensors const tensors{call.input(kX), call.input(kGate), call.input(kWeight),
                                    call.output(kY)};
  return gatedRmsNorm(call.dtype, sizesOf(call), attributesOf(call.attributes), tensors,
                      call.stream);
}

Registration const registration({
    "GatedRmsNorm",
    "1",
    {{"x", "BTHD"}, joins({"gate", "BTHD"}), {"weight", "D"}},
    {{"y", "BTHD"}},
    {{"epsilon", Kind::kFloat},
     {"activation", Kind::kChoice, {"silu", "sigmoid"}},
     {"round_before_weight", Kind::kBool}},
    enqueue,
    nullptr,
    supports,
});

}  // namespace
}  // namespace llmexport
