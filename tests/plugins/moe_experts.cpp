// Launch plans and workspace of MoeExperts, for test_moe_experts_plan.py by
// ctypes.
#include "moe_experts/moe_experts.h"

using namespace llmexport;

namespace {

MoeExpertsSizes sizesOf(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4]}; }

}  // namespace

// sizes: tokens, slots, experts, hidden, intermediate, SMs, shared memory of a
// block. It writes grid.x, block.x and bytes of shared memory of each launch,
// in their order.
extern "C" void moe_plan(int64_t const* sizes, int dtype, int stored, int format, int group,
                         bool hasFactors, bool pointersAligned, int64_t* out) {
  auto const plan = moeExpertsPlan(sizesOf(sizes), Dtype(dtype),
                                   {Stored(stored), WeightFormat(format), group, hasFactors},
                                   pointersAligned, {int(sizes[5]), size_t(sizes[6])});
  int64_t const values[] = {plan.onTensorCores, plan.sorted, plan.tileRows,  plan.rowTiles,
                            plan.upTiles,       plan.width,  plan.downTiles, plan.rowBlocks};
  for (int64_t value : values) *out++ = value;
  for (LaunchPlan const* launch : {&plan.scale, &plan.sort, &plan.up, &plan.down, &plan.combine}) {
    *out++ = launch->grid.x;
    *out++ = launch->block.x;
    *out++ = int64_t(launch->sharedBytes);
  }
}

extern "C" void moe_workspace(int64_t const* sizes, int dtype, int64_t* out) {
  auto const parts = moeExpertsWorkspace(sizesOf(sizes), Dtype(dtype));
  for (size_t part : {parts.gated, parts.outputs, parts.order, parts.tiles, parts.bytes}) {
    *out++ = int64_t(part);
  }
}
