#include "gated_act/gated_act.h"
#include "trt/op.h"

namespace llmexport {
namespace {

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  return gatedAct(call.dtype, s['B'] * s['T'] * s['I'], Activation(call.attributes[0].integer),
                  call.attributes[1].real, call.attributes[2].real, call.inputs[0], call.inputs[1],
                  call.outputs[0], call.stream);
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
});

}  // namespace
}  // namespace llmexport
