#include "gated_delta_rule/limits.h"
#include "kimi_delta_rule/kimi_delta_rule.cuh"

namespace llmexport {
namespace {

// Up to so many tokens, one chunk's, the recurrence does with one launch (reckoned, not measured).
constexpr int64_t kFewTokens = 16;

bool hasChunks(KimiDeltaRuleSizes const& s, Dtype dtype) {
  bool const wide = s.D == 64 || s.D == 128;  // two warps' halves of whole tiles
  return dtype != Dtype::kFloat32 && wide && s.T > kFewTokens;
}

struct Arguments {
  KimiDeltaRulePlan const& plan;
  KimiDeltaRuleSizes const& sizes;
  KimiDeltaRuleAttributes const& attributes;
  KimiDeltaRuleTensors const& tensors;
  void* workspace;
  cudaStream_t stream;
};

template <class T, bool kVectors>
cudaError_t startRecurrence(Arguments const& a) {
  KimiDeltaRuleTensors const& t = a.tensors;
  return launch(recurrenceKernel<T, kVectors, DecayOf::kRow>, a.plan.recurrence, a.stream,
                typed<T>(t.q), typed<T>(t.k), typed<T>(t.v), t.g, typed<T>(t.beta), t.state,
                typed<T>(t.y), t.nextState, a.sizes.T, int(a.sizes.H), int(a.sizes.D),
                int(a.sizes.V), a.attributes.scale, a.attributes.l2Norm);
}

template <class T, int D>
cudaError_t startChunks(Arguments const& a) {
  KimiDeltaRuleTensors const& t = a.tensors;
  auto* const records = typed<KimiChunkRecord>(a.workspace);
  cudaError_t const error =
      launch(kimiPrepareKernel<T, D>, a.plan.prepare, a.stream, typed<T>(t.q), typed<T>(t.k), t.g,
             typed<T>(t.beta), records, a.sizes.T, a.attributes.scale, a.attributes.l2Norm);
  if (error != cudaSuccess) return error;
  return launch(kimiScanKernel<T, D>, a.plan.scan, a.stream, typed<T>(t.q), typed<T>(t.k),
                typed<T>(t.v), t.g, t.state, records, typed<T>(t.y), t.nextState, a.sizes.T,
                int(a.sizes.V));
}

}  // namespace

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& s) {
  return deltaRuleServes("KimiDeltaRule", s.B, s.T, s.H, s.D, s.V);
}

KimiDeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& s, Dtype dtype,
                                    bool pointersAligned) {
  unsigned const H = unsigned(s.H), B = unsigned(s.B);
  KimiDeltaRulePlan plan{};
  plan.chunked = pointersAligned && hasChunks(s, dtype);
  plan.width = pointersAligned ? kThreadColumns : 1;
  if (!plan.chunked) {
    unsigned const slices = unsigned(ceilDiv(s.V, kRecurrenceColumns));
    plan.recurrence = {dim3(slices, H, B), dim3(kRecurrenceThreads)};
    return plan;
  }
  plan.prepare = {dim3(unsigned(ceilDiv(s.T, kKimiChunk * kKimiPrepareChunks)), H, B),
                  dim3(kChunkThreads)};
  plan.scan = {dim3(unsigned(ceilDiv(s.V, kScanColumns)), H, B), dim3(kChunkThreads),
               s.D == 64 ? sizeof(KimiScanShared<Half, 64>) : sizeof(KimiScanShared<Half, 128>)};
  return plan;
}

size_t kimiDeltaRuleWorkspace(KimiDeltaRuleSizes const& s, Dtype dtype) {
  if (!hasChunks(s, dtype)) return 0;
  return size_t(s.B * s.H * ceilDiv(s.T, kKimiChunk)) * sizeof(KimiChunkRecord);
}

cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& s,
                          KimiDeltaRuleAttributes const& attributes, KimiDeltaRuleTensors const& t,
                          void* workspace, cudaStream_t stream) {
  if (!kimiDeltaRuleServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  bool const pointersAligned = aligned({t.q, t.k, t.v, t.g, t.state, t.y, t.nextState});
  auto const plan = kimiDeltaRulePlan(s, dtype, pointersAligned);
  Arguments const a{plan, s, attributes, t, workspace, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) == 2) {
      if (plan.chunked) return s.D == 64 ? startChunks<T, 64>(a) : startChunks<T, 128>(a);
    }
    return plan.width > 1 ? startRecurrence<T, true>(a) : startRecurrence<T, false>(a);
  });
}

}  // namespace llmexport
