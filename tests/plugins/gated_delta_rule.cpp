// Launch plans of GatedDeltaRule, for test_gated_delta_rule_plan.py by ctypes.
#include "gated_delta_rule/gated_delta_rule.h"

using namespace llmexport;

namespace {

GatedDeltaRuleSizes sizesOf(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

int64_t* write(LaunchPlan const& plan, int64_t* out) {
  int64_t const values[] = {plan.grid.x, plan.grid.y, plan.grid.z, plan.block.x,
                            int64_t(plan.sharedBytes)};
  for (int64_t value : values) *out++ = value;
  return out;
}

}  // namespace

extern "C" void delta_rule_plan(int64_t const* sizes, int dtype, bool pointersAligned,
                                int64_t* out) {
  auto const plan = gatedDeltaRulePlan(sizesOf(sizes), Dtype(dtype), pointersAligned);
  *out++ = plan.chunked;
  *out++ = plan.width;
  for (LaunchPlan const& launch : {plan.recurrence, plan.prepare, plan.scan}) {
    out = write(launch, out);
  }
}

extern "C" int64_t delta_rule_workspace(int64_t const* sizes, int dtype) {
  return int64_t(gatedDeltaRuleWorkspace(sizesOf(sizes), Dtype(dtype)));
}
