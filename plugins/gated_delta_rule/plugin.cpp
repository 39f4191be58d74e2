#include "gated_delta_rule/gated_delta_rule.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kG, kBeta, kState };
enum Outputs { kY, kNextState };
enum Attributes { kScale, kL2Norm };

GatedDeltaRuleSizes sizesOf(Sizes const& s) {
  return {s['B'], s['T'], s['G'], s['H'], s['D'], s['V']};
}

DeltaRuleAttributes attributesOf(Values const& values) {
  return {values[kScale].real, values[kL2Norm].integer != 0};
}

bool check(Sizes const& sizes, Values const&) { return gatedDeltaRuleFits(sizesOf(sizes)); }

bool supports(Node const& node) { return gatedDeltaRuleServes(sizesOf(node.sizes)); }

size_t workspace(Node const& node) {
  return gatedDeltaRuleWorkspace(sizesOf(node.sizes), node.dtype);
}

cudaError_t enqueue(Call const& call) {
  GatedDeltaRuleSizes const sizes = sizesOf(call.sizes);
  DeltaRuleTensors const tensors{call.input(kQ),    call.input(kK),
                                 call.input(kV),    call.input<float>(kG),
                                 call.input(kBeta), call.input<float>(kState),
                                 call.output(kY),   call.output<float>(kNextState),
                                 sizes.G * sizes.D, sizes.H * sizes.V};
  return gatedDeltaRule(call.dtype, sizes, attributesOf(call.attributes), tensors,
                        call.workspace, call.stream);
}

Registration const registration({
    "GatedDeltaRule",
    "1",
    {{"q", "BTGD"},
     {"k", "BTGD"},
     {"v", "BTHV"},
     {"g", "BTH", Element::kFloat32},
     {"beta", "BTH"},
     {"state", "BHDV", Element::kFloat32}},
    {{"y", "BTHV"}, {"next_state", "BHDV", Element::kFloat32}},
    {{"scale", Kind::kFloat}, {"l2_norm", Kind::kBool}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
