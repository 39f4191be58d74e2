#include "gated_delta_net/gated_delta_net.cuh"

#include "gated_delta_rule/gated_delta_rule.h"
#include "gated_delta_rule/limits.h"

namespace llmexport {
namespace {

// Blocks for each SM up to which one kernel that has an SM for itself is faster than three that
// follow each other (reckoned, not measured).
constexpr int64_t kDecodeBlocks = 2;

size_t wholeVectors(size_t bytes) { return size_t(ceilDiv(bytes, kVectorBytes)) * kVectorBytes; }

// Sizes of which C is known to be 2 G D + H V.
GatedDeltaRuleSizes ruleOf(GatedDeltaNetSizes const& s) {
  return {s.B, s.T, (s.C - s.H * s.V) / (2 * s.D), s.H, s.D, s.V};
}

template <class T>
GateTensors<T> gatesOf(GatedDeltaNetSizes const& s, GatedDeltaNetTensors const& t) {
  return {typed<T>(t.a),    typed<T>(t.b),      typed<T>(t.present),
          typed<T>(t.aLog), typed<T>(t.dtBias), s.pitch ? s.pitch : s.H};
}

template <class T, bool kVectors>
cudaError_t startDecode(GatedDeltaNetPlan const& plan, GatedDeltaNetSizes const& s,
                        GatedDeltaNetAttributes const& attributes, GatedDeltaNetTensors const& t,
                        cudaStream_t stream) {
  TokenConvolution<T> const convolution{typed<T>(t.mixed),         typed<T>(t.convWeight),
                                        typed<T>(t.convState),     t.end,
                                        typed<T>(t.nextConvState), s.C,
                                        s.pitch ? s.pitch : s.C,   int(s.K)};
  DecodeArguments<T> const arguments{convolution,
                                     gatesOf<T>(s, t),
                                     typed<T>(t.z),
                                     typed<T>(t.normWeight),
                                     t.state,
                                     typed<T>(t.gated),
                                     t.nextState,
                                     s.pitch ? s.pitch : s.H * s.V,
                                     int(ruleOf(s).G),
                                     int(s.D),
                                     int(s.V),
                                     attributes.rule.scale,
                                     attributes.rule.l2Norm,
                                     attributes.norm};
  return launch(decodeKernel<T, kVectors>, plan.decode, stream, arguments);
}

}  // namespace

bool gatedDeltaNetFits(GatedDeltaNetSizes const& s) {
  for (int64_t const size : {s.C, s.H, s.D, s.V}) {
    if (size == kUnknown) return true;
  }
  int64_t const values = product({s.H, s.V});
  int64_t const keys = s.C - values;  // channels of q and k
  bool const whole = keys > 0 && s.D > 0 && keys % (2 * s.D) == 0;
  if (whole && s.H % (keys / (2 * s.D)) == 0) return true;
  return refuse(
      "GatedDeltaNet: mixed has C = %lld channels, not G heads of D = %lld of q and of k, where G "
      "divides H, and H = %lld heads of V = %lld",
      (long long)s.C, (long long)s.D, (long long)s.H, (long long)s.V);
}

bool gatedDeltaNetServes(GatedDeltaNetSizes const& s) {
  return gatedDeltaNetFits(s) && deltaRuleServes("GatedDeltaNet", s.B, s.T, s.H, s.D, s.V) &&
         causalConv1dServes("GatedDeltaNet", {s.B, s.T, s.C, s.K}) &&
         isAtMost("GatedDeltaNet", "BTH", {s.B, s.T, s.H}, kMaxGridX);
}

GatedDeltaNetPlan gatedDeltaNetPlan(GatedDeltaNetSizes const& s, bool pointersAligned,
                                    Device const& device) {
  GatedDeltaNetPlan plan{};
  plan.fused = s.T == 1 && s.B * s.H <= kDecodeBlocks * device.processors;
  plan.width = pointersAligned ? kThreadColumns : 1;
  if (plan.fused) {
    plan.decode = {dim3(unsigned(s.H), unsigned(s.B)),
                   dim3(kRecurrenceThreads, unsigned(ceilDiv(s.V, kRecurrenceColumns)))};
  } else {
    plan.gates = {dim3(unsigned(ceilDiv(s.B * s.T * s.H, kGateThreads))), dim3(kGateThreads)};
  }
  return plan;
}

size_t gatedDeltaNetWorkspace(GatedDeltaNetSizes const& s, Dtype dtype) {
  size_t const gates = size_t(s.B * s.T * s.H);
  return wholeVectors(size_t(s.B * s.T * s.C) * sizeOf(dtype)) +
         wholeVectors(gates * sizeof(float)) + wholeVectors(gates * sizeOf(dtype)) +
         gatedDeltaRuleWorkspace(ruleOf(s), dtype);
}

cudaError_t gatedDeltaNet(Dtype dtype, GatedDeltaNetSizes const& s,
                          GatedDeltaNetAttributes const& attributes, GatedDeltaNetTensors const& t,
                          void* workspace, Device const& device, cudaStream_t stream) {
  if (!gatedDeltaNetServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  bool const alignedAll =
      aligned({t.z, t.normWeight, t.state, t.gated, t.nextState}) && s.pitch % kThreadColumns == 0;
  auto const plan = gatedDeltaNetPlan(s, alignedAll, device);
  if (plan.fused) {
    return withType(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return plan.width > 1 ? startDecode<T, true>(plan, s, attributes, t, stream)
                            : startDecode<T, false>(plan, s, attributes, t, stream);
    });
  }
  auto const sizes = ruleOf(s);
  int64_t const count = s.B * s.T * s.H, keys = sizes.G * s.D;
  auto* const mixed = static_cast<unsigned char*>(workspace);
  auto* const decays = mixed + wholeVectors(size_t(s.B * s.T * s.C) * sizeOf(dtype));
  auto* const beta = decays + wholeVectors(size_t(count) * sizeof(float));
  auto* const g = reinterpret_cast<float*>(decays);
  cudaError_t error = causalConv1d(
      dtype, {s.B, s.T, s.C, s.K, s.pitch}, {true},
      {t.mixed, t.convWeight, t.convState, t.end, nullptr, mixed, t.nextConvState}, device, stream);
  if (error != cudaSuccess) return error;
  if (count > 0) {
    error = withType(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return launch(gatesKernel<T>, plan.gates, stream, gatesOf<T>(s, t), g,
                    reinterpret_cast<T*>(beta), count, int(s.H));
    });
  }
  if (error != cudaSuccess) return error;
  auto const part = [&](int64_t channel) {
    return mixed + channel * int64_t(sizeOf(dtype));
  };
  DeltaRuleTensors const rule{part(0), part(keys), part(2 * keys), g,   beta, t.state,
                              t.gated, t.nextState, s.C,           s.C};
  error = gatedDeltaRule(dtype, sizes, attributes.rule, rule,
                         beta + wholeVectors(count * sizeOf(dtype)), stream);
  if (error != cudaSuccess) return error;
  // In place: a thread writes what it alone has read.
  return gatedRmsNorm(dtype, {s.B, s.T, s.H, s.V, s.pitch}, attributes.norm,
                      {t.gated, t.z, t.normWeight, t.gated}, stream);
}

}  // namespace llmexport
