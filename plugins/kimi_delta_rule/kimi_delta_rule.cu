#include "gated_delta_rule/limits.h"
#include "gated_delta_rule/recurrence.cuh"
#include "kimi_delta_rule/kimi_delta_rule.h"

namespace llmexport {
namespace {

template <class T, bool kVectors>
cudaError_t start(LaunchPlan const& plan, KimiDeltaRuleSizes const& s,
                  KimiDeltaRuleAttributes const& attributes, KimiDeltaRuleTensors const& t,
                  cudaStream_t stream) {
  return launch(recurrenceKernel<T, kVectors, DecayOf::kRow>, plan, stream, typed<T>(t.q),
                typed<T>(t.k), typed<T>(t.v), t.g, typed<T>(t.beta), t.state, typed<T>(t.y),
                t.nextState, s.T, int(s.H), int(s.D), int(s.V), attributes.scale,
                attributes.l2Norm);
}

}  // namespace

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& s) {
  return deltaRuleServes("KimiDeltaRule", s.B, s.T, s.H, s.D, s.V);
}

KimiDeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& s, bool pointersAligned) {
  unsigned const slices = unsigned(ceilDiv(s.V, kRecurrenceColumns));
  return {pointersAligned ? kThreadColumns : 1,
          {dim3(slices, unsigned(s.H), unsigned(s.B)), dim3(kRecurrenceThreads)}};
}

// A token takes one pass over the state in registers, D V / 128 elements a thread of each block of
// 32 columns, four instructions an element. At Kimi Linear's H = 32, D = V = 128 a row of the batch
// has 128 blocks, and decode moves 2 * 4 H D V = 4.2 MB of states for it: bytes are its floor. A
// prompt's tokens wait for each other: its time grows with T alone, as it did in the body.
cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& s,
                          KimiDeltaRuleAttributes const& attributes, KimiDeltaRuleTensors const& t,
                          cudaStream_t stream) {
  if (!kimiDeltaRuleServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  auto const plan = kimiDeltaRulePlan(s, aligned({t.v, t.state, t.y, t.nextState}));
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    return plan.width > 1 ? start<T, true>(plan.recurrence, s, attributes, t, stream)
                          : start<T, false>(plan.recurrence, s, attributes, t, stream);
  });
}

}  // namespace llmexport
