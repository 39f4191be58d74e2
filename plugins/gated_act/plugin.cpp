#include "gated_act/gated_act.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kGate, kUp };
enum Outputs { kY };
enum Attributes { kActivation, kAlpha, kLimit };

// J is that of gate: I, or that of both halves.
GatedActSizes sizesOf(Node const& node) {
  Sizes const& s = node.sizes;
  bool const halves = node.inputCount <= kUp;
  int64_t const J = s['J'];
  return {s['B'], s['T'], halves && J != kUnknown ? J / 2 : J, halves, node.pitch};
}

GatedActAttributes attributesOf(Values const& values) {
  return {Activation(values[kActivation].integer), values[kAlpha].real, values[kLimit].real};
}

bool supports(Node const& node) {
  GatedActSizes const s = sizesOf(node);
  int64_t const I = node.sizes['I'], J = node.sizes['J'];
  int64_t const wanted = s.halves ? 2 * I : I;
  if (I != kUnknown && J != kUnknown && J != wanted) {
    return refuse("GatedAct: gate has J = %lld columns, not %lld", (long long)J, (long long)wanted);
  }
  return gatedActServes(s);
}

cudaError_t enqueue(Call const& call) {
  GatedActTensors const tensors{call.input(kGate), call.input(kUp), call.output(kY)};
  return gatedAct(call.dtype, sizesOf(call), attributesOf(call.attributes), tensors, call.stream);
}

Registration const registration({
    "GatedAct",
    "1",
    {joins({"gate", "BTJ"}), joins({"up", "BTI", Element::kT, kOptional})},
    {{"y", "BTI"}},
    // The choices in the order of enum class Activation.
    {{"activation", Kind::kChoice, {"silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"}},
     {"alpha", Kind::kFloat},
     {"limit", Kind::kFloat}},
    enqueue,
    nullptr,
    supports,
    nullptr,
    "IJ",
});

}  // namespace
}  // namespace llmexport
