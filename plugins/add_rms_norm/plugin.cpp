#include "add_rms_norm/add_rms_norm.h"
#include "trt/op.h"

namespace llmexport {
namespace {

int32_t supports(Node const& node) {
  return checkProduct("AddRmsNorm", node.sizes, "BT", kMaxGridX);
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  AddRmsNormAttributes const attributes{call.attributes[0].real, call.attributes[1].real,
                                        call.attributes[2].integer != 0};
  return addRmsNorm(call.dtype, s['B'] * s['T'], s['C'], attributes, call.inputs[0], call.inputs[1],
                    call.inputs[2], call.outputs[0], call.outputs[1], call.stream);
}

Registration const registration({
    "AddRmsNorm",
    {{"x", "BTC"}, {"residual", "BTC"}, {"weight", "C"}},
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
