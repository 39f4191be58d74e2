// How the host starts a delta rule, whatever of the state decays.
#pragma once

#include "gated_delta_rule/delta_rule.h"
#include "gated_delta_rule/recurrence.cuh"

namespace llmexport {

// Up to so many tokens the recurrence is at least as fast: a chunk takes two launches and the time
// of about as many of its steps (reckoned, not measured).
constexpr int64_t kFewTokens = 16;

template <class Sizes>
bool hasChunks(Sizes const& s, Dtype dtype) {
  bool const wide = s.D == 64 || s.D == 128;  // two warps' halves of whole tiles
  return dtype != Dtype::kFloat32 && wide && s.T > kFewTokens;
}

template <class Sizes>
struct DeltaRuleCall {
  DeltaRulePlan const& plan;
  Sizes const& sizes;
  int keyHeads;  // of q and k
  DeltaRuleAttributes const& attributes;
  DeltaRuleTensors const& tensors;
  void* workspace;
  cudaStream_t stream;
};

// The plan but for its chunks, if it has them.
template <class Sizes>
DeltaRulePlan recurrencePlan(Sizes const& s, Dtype dtype, bool pointersAligned) {
  DeltaRulePlan plan{};
  plan.chunked = pointersAligned && hasChunks(s, dtype);
  plan.width = pointersAligned ? kThreadColumns : 1;
  if (!plan.chunked) {
    unsigned const slices = unsigned(ceilDiv(s.V, kRecurrenceColumns));
    plan.recurrence = {dim3(slices, unsigned(s.H), unsigned(s.B)), dim3(kRecurrenceThreads)};
  }
  return plan;
}

template <class T, bool kVectors, DecayOf kDecay, class Call>
cudaError_t startRecurrence(Call const& c) {
  DeltaRuleTensors const& t = c.tensors;
  return launch(recurrenceKernel<T, kVectors, kDecay>, c.plan.recurrence, c.stream, typed<T>(t.q),
                typed<T>(t.k), typed<T>(t.v), t.g, typed<T>(t.beta), t.state, typed<T>(t.y),
                t.nextState, t.keyStride, t.valueStride, c.sizes.T, c.keyHeads, int(c.sizes.D),
                int(c.sizes.V), c.attributes.scale, c.attributes.l2Norm);
}

// `Chunks::start<T, D>` starts the plan's chunks, of 16-bit tokens T.
template <DecayOf kDecay, class Chunks, class Call>
cudaError_t startDeltaRule(Dtype dtype, Call const& c) {
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (c.plan.chunked) {
        return c.sizes.D == 64 ? Chunks::template start<T, 64>(c)
                               : Chunks::template start<T, 128>(c);
      }
    }
    return c.plan.width > 1 ? startRecurrence<T, true, kDecay>(c)
                            : startRecurrence<T, false, kDecay>(c);
  });
}

}  // namespace llmexport
