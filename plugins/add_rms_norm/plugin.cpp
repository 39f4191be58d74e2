#include "add_rms_norm/add_rms_norm.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kResidual, kWeight, kInner };
enum Outputs { kY, kSum };
enum Attributes { kEpsilon, kWeightOffset, kRoundBeforeWeight };

AddRmsNormSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['C']}; }

AddRmsNormAttributes attributesOf(Values const& values) {
  return {values[kEpsilon].real, values[kWeightOffset].real,
          values[kRoundBeforeWeight].integer != 0};
}

bool supports(Node const& node) { return addRmsNormServes(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  AddRmsNormTensors const tensors{call.input(kX),     call.input(kResidual), call.input(kWeight),
                                  call.input(kInner), call.output(kY),       call.output(kSum)};
  return addRmsNorm(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
                    call.stream);
}

Registration const registration({
    "AddRmsNorm",
    "1",
    {{"x", "BTC"}, {"residual", "BTC"}, {"weight", "C"}, {"inner", "C", Element::kT, kOptional}},
    {{"y", "BTC"}, {"sum", "BTC"}},
    {{"epsilon", Kind::kFloat},
     {"weight_offset", Kind::kFloat},
     {"round_before_weight", Kind::kBool}},
    enqueue,
    nullptr,
    supports,
});

}  // namespace
}  // namespace llmexport
