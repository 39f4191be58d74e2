// Launch plans of KimiDeltaRule, for test_kimi_delta_rule_plan.py by ctypes.
#include "kimi_delta_rule/kimi_delta_rule.h"

using namespace llmexport;

namespace {

KimiDeltaRuleSizes sizesOf(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4]}; }

}  // namespace

extern "C" void kimi_plan(int64_t const* sizes, int dtype, bool pointersAligned, int64_t* out) {
  auto const plan = kimiDeltaRulePlan(sizesOf(sizes), Dtype(dtype), pointersAligned);
  *out++ = plan.chunked;
  *out++ = plan.width;
  for (LaunchPlan const& launch : {plan.recurrence, plan.prepare, plan.scan}) {
    int64_t const values[] = {launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x,
                              int64_t(launch.sharedBytes)};
    for (int64_t value : values) *out++ = value;
  }
}

extern "C" int64_t kimi_workspace(int64_t const* sizes, int dtype) {
  return int64_t(kimiDeltaRuleWorkspace(sizesOf(sizes), Dtype(dtype)));
}
