#include "kimi_delta_rule/kimi_delta_rule.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kG, kBeta, kState };
enum Outputs { kY, kNextState };
enum Attributes { kScale, kL2Norm };

KimiDeltaRuleSizes sizesOf(Sizes const& s) { return {s['B'], s['T'], s['H'], s['D'], s['V']}; }

DeltaRuleAttributes attributesOf(Values const& values) {
  return {values[kScale].real, values[kL2Norm].integer != 0};
}

bool supports(Node const& node) { return kimiDeltaRuleServes(sizesOf(node.sizes)); }

size_t workspace(Node const& node) {
  return kimiDeltaRuleWorkspace(sizesOf(node.sizes), node.dtype);
}

cudaError_t enqueue(Call const& call) {
  KimiDeltaRuleSizes const sizes = sizesOf(call.sizes);
  DeltaRuleTensors const tensors{call.input(kQ),    call.input(kK),
                                 call.input(kV),    call.input<float>(kG),
                                 call.input(kBeta), call.input<float>(kState),
                                 call.output(kY),   call.output<float>(kNextState),
                                 sizes.H * sizes.D, sizes.H * sizes.V};
  return kimiDeltaRule(call.dtype, sizes, attributesOf(call.attributes), tensors, call.workspace,
                       call.stream);
}

Registration const registration({
    "KimiDeltaRule",
    "1",
    {{"q", "BTHD"},
     {"k", "BTHD"},
     {"v", "BTHV"},
     {"g", "BTHD", Element::kFloat32},
     {"beta", "BTH"},
     {"state", "BHDV", Element::kFloat32}},
    {{"y", "BTHV"}, {"next_state", "BHDV", Element::kFloat32}},
    {{"scale", Kind::kFloat}, {"l2_norm", Kind::kBool}},
    enqueue,
    nullptr,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
