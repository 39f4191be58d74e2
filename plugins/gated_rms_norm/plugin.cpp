#include "gated_rms_norm/gated_rms_norm.h"
#include "trt/op.h"

namespace llmexport {
namespace {

int32_t supports(Node const& node) {
  return checkProduct("GatedRmsNorm", node.sizes, "BTH", kMaxGridX);
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  GatedRmsNormAttributes const attributes{call.attributes[0].real, call.attributes[1].integer == 0,
                                          call.attributes[2].integer != 0};
  return gatedRmsNorm(call.dtype, s['B'] * s['T'] * s['H'], s['D'], attributes, call.inputs[0],
                      call.inputs[1], call.inputs[2], call.outputs[0], call.stream);
}

Registration const registration({
    "GatedRmsNorm",
    {{"x", "BTHD"}, {"gate", "BTHD"}, {"weight", "D"}},
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
