#include "gated_act/gated_act.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kGate, kUp };
enum Outputs { kY };
enum Attributes { kActivation, kAlpha, kLimit };

GatedActSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['I']}; }

GatedActAttributes attributesOf(Values const& values) {
  return {Activation(values[kActivation].integer), values[kAlpha].real, values[kLimit].real};
}

bool supports(Node const& node) { return gatedActServes(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  GatedActTensors const tensors{call.input(kGate), call.input(kUp), call.output(kY)};
  return gatedAct(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
                  call.stream);
}

Registration const registration({
    "GatedAct",
    {{"gate", "BTI"}, {"up", "BTI"}},
    {{"y", "BTI"}},
    // The choices in the order of enum class Activation.
    {{"activation", Kind::kChoice, {"silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"}},
     {"alpha", Kind::kFloat},
     {"limit", Kind::kFloat}},
    enqueue,
    nullptr,
    supports,
});

}  // namespace
}  // namespace llmexport
