// Launch plans of the delta rules, for delta_rule_plans.py by ctypes.
#include "gated_delta_rule/gated_delta_rule.h"
#include "kimi_delta_rule/kimi_delta_rule.h"

using namespace llmexport;

namespace {

GatedDeltaRuleSizes gated(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
KimiDeltaRuleSizes kimi(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4]}; }

void write(DeltaRulePlan const& plan, int64_t* out) {
  *out++ = plan.chunked;
  *out++ = plan.width;
  for (LaunchPlan const& launch : {plan.recurrence, plan.prepare, plan.scan}) {
    int64_t const values[] = {launch.grid.x, launch.grid.y, launch.grid.z, launch.block.x,
                              int64_t(launch.sharedBytes)};
    for (int64_t value : values) *out++ = value;
  }
}

}  // namespace

extern "C" {

void gated_plan(int64_t const* sizes, int dtype, bool pointersAligned, int64_t* out) {
  write(gatedDeltaRulePlan(gated(sizes), Dtype(dtype), pointersAligned), out);
}

void kimi_plan(int64_t const* sizes, int dtype, bool pointersAligned, int64_t* out) {
  write(kimiDeltaRulePlan(kimi(sizes), Dtype(dtype), pointersAligned), out);
}

int64_t gated_workspace(int64_t const* sizes, int dtype) {
  return int64_t(gatedDeltaRuleWorkspace(gated(sizes), Dtype(dtype)));
}

int64_t kimi_workspace(int64_t const* sizes, int dtype) {
  return int64_t(kimiDeltaRuleWorkspace(kimi(sizes), Dtype(dtype)));
}

}
