// The launch plans of the kernels, for test_launch_plans.py by ctypes.
#include "causal_conv1d/causal_conv1d.h"
#include "common/row_plan.h"
#include "gated_act/gated_act.h"
#include "gated_delta_net/gated_delta_net.h"
#include "moe_route/moe_route.h"
#include "normed_moe_route/normed_moe_route.h"
#include "qk_norm_rope/qk_norm_rope.h"
#include "rope/rope.h"
#include "wkv/wkv.h"
#include "wkv7/wkv7.h"

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

extern "C" void plan_qk_norm_rope(int64_t const* sizes, int dtype, bool pointersAligned,
                                  int64_t* out) {
  auto const plan =
      qkNormRopePlan({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]},
                     Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
  out[8] = plan.once;
}

extern "C" void plan_rows(int64_t const* sizes, int dtype, bool pointersAligned, int64_t* out) {
  auto const plan = rowPlan(sizes[0], sizes[1], Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
  out[8] = plan.vectors;
}

extern "C" void plan_gated_act(int64_t const* sizes, int dtype, bool pointersAligned,
                               int64_t* out) {
  auto const plan =
      gatedActPlan({1, sizes[0], sizes[1], sizes[2] != 0}, Dtype(dtype), pointersAligned);
  write(plan.launch, out);
  out[7] = plan.width;
}

// sizes: B, T, C, K, SMs.
extern "C" void plan_causal_conv1d(int64_t const* sizes, int dtype, bool pointersAligned,
                                   int64_t* out) {
  Device const device{int(sizes[4]), 0};
  auto const plan = causalConv1dPlan({sizes[0], sizes[1], sizes[2], sizes[3]}, Dtype(dtype),
                                     pointersAligned, device);
  write(plan.launch, out);
  out[7] = plan.width;
  out[8] = plan.length;
  out[9] = plan.chunks;
}

// sizes: B, T, C, H, D, V, SMs; of four taps.
extern "C" void plan_gated_delta_net(int64_t const* s, int, bool pointersAligned, int64_t* out) {
  Device const device{int(s[6]), 0};
  auto const plan =
      gatedDeltaNetPlan({s[0], s[1], s[2], s[3], s[4], s[5], 4}, pointersAligned, device);
  write(plan.fused ? plan.decode : plan.gates, out);
  out[7] = plan.width;
  out[8] = plan.fused;
}

// sizes: rows, experts, top_k, groups.
extern "C" void plan_moe_route(int64_t const* sizes, int, bool, int64_t* out) {
  MoeRouteAttributes attributes{};
  attributes.topK = int32_t(sizes[2]);
  attributes.groups = int32_t(sizes[3]);
  auto const plan = moeRoutePlan({1, sizes[0], sizes[1]}, attributes);
  write(plan.launch, out);
  out[8] = plan.perLane;
}

// sizes: tokens, E, top_k, whether there is a gate, and which launch. [7] is a cluster's blocks, [8]
// the parts of a tile.
extern "C" void plan_normed_moe_route(int64_t const* sizes, int, bool, int64_t* out) {
  NormedMoeRouteAttributes attributes{};
  attributes.route.topK = int32_t(sizes[2]);
  auto const plan = normedMoeRoutePlan({sizes[0], 64, sizes[1]}, attributes, sizes[3] != 0);
  LaunchPlan const launches[] = {plan.cluster, plan.products, plan.route};
  write(launches[sizes[4]], out);
  out[7] = launches[sizes[4]].cluster;
  out[8] = plan.parts;
}

// sizes: B, T, C.
extern "C" void plan_wkv(int64_t const* sizes, int, bool, int64_t* out) {
  write(wkvPlan({sizes[0], sizes[1], sizes[2]}), out);
}

// sizes: B, T, H, D, V.
extern "C" void plan_wkv7(int64_t const* sizes, int, bool, int64_t* out) {
  write(wkv7Plan({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]}), out);
}
