// The launchers with sizes that their kernels do not take and no tensors, for test_limits.py by
// ctypes: each returns before it launches.
#include "add_rms_norm/add_rms_norm.h"
#include "causal_conv1d/causal_conv1d.h"
#include "gated_act/gated_act.h"
#include "gated_delta_net/gated_delta_net.h"
#include "gated_delta_rule/gated_delta_rule.h"
#include "gated_rms_norm/gated_rms_norm.h"
#include "kimi_delta_rule/kimi_delta_rule.h"
#include "moe_experts/moe_experts.h"
#include "moe_route/moe_route.h"
#include "qk_norm_rope/qk_norm_rope.h"
#include "qk_norm_rope_write/qk_norm_rope_write.h"
#include "rope/rope.h"
#include "sink_attention/sink_attention.h"
#include "wkv/wkv.h"
#include "wkv7/wkv7.h"

using namespace llmexport;

namespace {

constexpr Dtype kDtype = Dtype::kFloat16;
constexpr Device kDevice{132, 227 * 1024, 90};

}  // namespace

// Sizes are those of the op's struct, in its order.
extern "C" int launch_Rope(int64_t const* s) {
  return rope(kDtype, {s[0], s[1], s[2], s[3], s[4]}, {}, {}, nullptr);
}

extern "C" int launch_QkNormRope(int64_t const* s) {
  return qkNormRope(kDtype, {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}, {}, {}, nullptr);
}

extern "C" int launch_QkNormRopeWrite(int64_t const* s) {
  return qkNormRopeWrite(kDtype, {{s[0], s[1], s[2], s[3], s[4], s[5], s[6]}, s[7]}, {}, {},
                         nullptr);
}

extern "C" int launch_AddRmsNorm(int64_t const* s) {
  return addRmsNorm(kDtype, {s[0], s[1], s[2]}, {}, {}, nullptr);
}

extern "C" int launch_GatedRmsNorm(int64_t const* s) {
  return gatedRmsNorm(kDtype, {s[0], s[1], s[2], s[3]}, {}, {}, nullptr);
}

extern "C" int launch_GatedAct(int64_t const* s) {
  return gatedAct(kDtype, {s[0], s[1], s[2], s[3] != 0}, {}, {}, nullptr);
}

extern "C" int launch_CausalConv1d(int64_t const* s) {
  return causalConv1d(kDtype, {s[0], s[1], s[2], s[3]}, {}, {}, kDevice, nullptr);
}

extern "C" int launch_MoeRoute(int64_t const* s) {
  MoeRouteAttributes const attributes{int32_t(s[3]), Scoring::kSoftmax, false, 1.0f, 1, 1, 2};
  return moeRoute(kDtype, {s[0], s[1], s[2]}, attributes, {}, nullptr);
}

extern "C" int launch_MoeExperts(int64_t const* s) {
  MoeExpertsTensors tensors{};
  tensors.stored = Stored::kFloat16;
  return moeExperts(kDtype, {s[0], s[1], s[2], s[3], s[4]}, {}, tensors, nullptr, kDevice, nullptr);
}

extern "C" int launch_SinkAttention(int64_t const* s) {
  return sinkAttention(kDtype, {s[0], s[1], s[2], s[3], s[4], s[5]}, {}, {}, nullptr, kDevice,
                       nullptr);
}

extern "C" int launch_GatedDeltaNet(int64_t const* s) {
  return gatedDeltaNet(kDtype, {s[0], s[1], s[2], s[3], s[4], s[5], s[6]}, {}, {}, nullptr, kDevice,
                       nullptr);
}

extern "C" int launch_GatedDeltaRule(int64_t const* s) {
  return gatedDeltaRule(kDtype, {s[0], s[1], s[2], s[3], s[4], s[5]}, {}, {}, nullptr, nullptr);
}

extern "C" int launch_KimiDeltaRule(int64_t const* s) {
  return kimiDeltaRule(kDtype, {s[0], s[1], s[2], s[3], s[4]}, {}, {}, nullptr, nullptr);
}

extern "C" int launch_Wkv(int64_t const* s) { return wkv(kDtype, {s[0], s[1], s[2]}, {}, nullptr); }

extern "C" int launch_Wkv7(int64_t const* s) {
  return wkv7(kDtype, {s[0], s[1], s[2], s[3], s[4]}, {}, nullptr);
}
