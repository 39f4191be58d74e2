#include "gated_delta_rule/gated_delta_rule.h"
#include "trt/op.h"

namespace llmexport {
namespace {

GatedDeltaRuleSizes sizesOf(Node const& node) {
  Sizes const& s = node.sizes;
  return {s['B'], s['T'], s['G'], s['H'], s['D'], s['V']};
}

int32_t check(Sizes const& sizes, Values const&) {
  int64_t const G = sizes['G'], H = sizes['H'];
  if (G == Sizes::kUnknown || H == Sizes::kUnknown || (G > 0 && H % G == 0)) return 0;
  return refuse("GatedDeltaRule: v has H = %lld heads, no multiple of the G = %lld of q and k",
                (long long)H, (long long)G);
}

int32_t supports(Node const& node) {
  for (char const letter : {'D', 'V'}) {
    int64_t const size = node.sizes[letter];
    if (size == Sizes::kUnknown || gatedDeltaRuleServes(size)) continue;
    return refuse("GatedDeltaRule: %c is %lld, but there are kernels for 16, 32, 64 and 128 only",
                  letter, (long long)size);
  }
  for (char const* const letter : {"B", "H"}) {
    int32_t const error = checkProduct("GatedDeltaRule", node.sizes, letter, kMaxGridY);
    if (error) return error;
  }
  return checkProduct("GatedDeltaRule", node.sizes, "T", INT32_MAX);
}

size_t workspace(Node const& node) { return gatedDeltaRuleWorkspace(sizesOf(node), node.dtype); }

cudaError_t enqueue(Call const& call) {
  GatedDeltaRuleTensors const tensors{call.inputs[0],  call.inputs[1],
                                      call.inputs[2],  static_cast<float const*>(call.inputs[3]),
                                      call.inputs[4],  static_cast<float const*>(call.inputs[5]),
                                      call.outputs[0], static_cast<float*>(call.outputs[1])};
  return gatedDeltaRule(call.dtype, sizesOf(call), call.attributes[0].real,
                        call.attributes[1].integer != 0, tensors, call.workspace, call.stream);
}

Registration const registration({
    "GatedDeltaRule",
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
