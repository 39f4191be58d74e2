#include "moe_experts/node.h"

namespace llmexport {
namespace {

enum Outputs { kY };

bool supports(Node const& node) { return moeExpertsSupports(node); }

cudaError_t enqueue(Call const& call) {
  auto const attributes = moeExpertsAttributesOf(call.attributes);
  return moeExperts(call.dtype, moeExpertsSizesOf(call.sizes, attributes), attributes,
                    moeExpertsTensorsOf(call, call.output(kY)), call.workspace, call.device,
                    call.stream);
}

Registration const registration({
    "MoeExperts",
    "1",
    moeExpertsInputs(),
    {{"y", "BTC"}},
    moeExpertsAttributes(),
    enqueue,
    moeExpertsFits,
    supports,
    moeExpertsWorkspaceOf,
});

}  // namespace
}  // namespace llmexport
