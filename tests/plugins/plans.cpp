// The launch plans of the kernels, for test_launch_plans.py by ctypes.
#include "add_rms_norm/add_rms_norm.h"
#include "gated_act/gated_act.h"
#include "rope/rope.h"

using namespace llmexport;

namespace {

void write(LaunchPlan const& plan, int64_t* out) {
  int64_t const values[] = {plan.grid.x,
                            plan.grid.y,
                            plan.grid.z,
                            plan.block.x,
                            plan.block.y,
                            plan.block.z,
                            int64_t(plan.sharedBytes)};
  for (int i = 0; i < 7; ++i) out[i] = values[i];
}

}  // namespace

extern "C" void plan_rope(int64_t const* sizes, int dtype, bool pointersAligned, int64_t* out) {
  auto const plan =
      ropePlan({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}, Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
}

extern "C" void plan_add_rms_norm(int64_t const* sizes, int dtype, bool pointersAligned,
                                  int64_t* out) {
  auto const plan = addRmsNormPlan(sizes[0], sizes[1], Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
  out[8] = plan.vectors;
}

extern "C" void plan_gated_act(int64_t const* sizes, int dtype, bool pointersAligned,
                               int64_t* out) {
  auto const plan = gatedActPlan(sizes[0], Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
}
