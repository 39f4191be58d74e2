#include "gated_delta_rule/limits.h"
#include "gated_delta_rule/start.cuh"
#include "kimi_delta_rule/kimi_delta_rule.cuh"

namespace llmexport {
namespace {

using Call = DeltaRuleCall<KimiDeltaRuleSizes>;

struct Chunks {
  template <class T, int D>
  static cudaError_t start(Call const& c) {
    DeltaRuleTensors const& t = c.tensors;
    auto* const records = typed<KimiChunkRecord>(c.workspace);
    cudaError_t const error =
        launch(kimiPrepareKernel<T, D>, c.plan.prepare, c.stream, typed<T>(t.q), typed<T>(t.k), t.g,
               typed<T>(t.beta), records, c.sizes.T, c.attributes.scale, c.attributes.l2Norm);
    if (error != cudaSuccess) return error;
    return launch(kimiScanKernel<T, D>, c.plan.scan, c.stream, typed<T>(t.q), typed<T>(t.k),
                  typed<T>(t.v), t.g, t.state, records, typed<T>(t.y), t.nextState, c.sizes.T,
                  int(c.sizes.V));
  }
};

}  // namespace

bool kimiDeltaRuleServes(KimiDeltaRuleSizes const& s) {
  return deltaRuleServes("KimiDeltaRule", s.B, s.T, s.H, s.D, s.V);
}

DeltaRulePlan kimiDeltaRulePlan(KimiDeltaRuleSizes const& s, Dtype dtype, bool pointersAligned) {
  DeltaRulePlan plan = recurrencePlan(s, dtype, pointersAligned);
  if (!plan.chunked) return plan;
  unsigned const H = unsigned(s.H), B = unsigned(s.B);
  plan.prepare = {dim3(unsigned(ceilDiv(s.T, kKimiChunk * kKimiPrepareChunks)), H, B),
                  dim3(kChunkThreads)};
  plan.scan = {dim3(unsigned(ceilDiv(s.V, kScanColumns)), H, B), dim3(kKimiScanThreads),
               s.D == 64 ? sizeof(KimiScanShared<Half, 64>) : sizeof(KimiScanShared<Half, 128>)};
  return plan;
}

size_t kimiDeltaRuleWorkspace(KimiDeltaRuleSizes const& s, Dtype dtype) {
  if (!hasChunks(s, dtype)) return 0;
  return size_t(s.B * s.H * ceilDiv(s.T, kKimiChunk)) * sizeof(KimiChunkRecord);
}

cudaError_t kimiDeltaRule(Dtype dtype, KimiDeltaRuleSizes const& s,
                          DeltaRuleAttributes const& attributes, DeltaRuleTensors const& t,
                          void* workspace, cudaStream_t stream) {
  if (!kimiDeltaRuleServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  bool const pointersAligned = aligned({t.q, t.k, t.v, t.g, t.state, t.y, t.nextState});
  auto const plan = kimiDeltaRulePlan(s, dtype, pointersAligned);
  Call const call{plan, s, int(s.H), attributes, t, workspace, stream};
  return startDeltaRule<DecayOf::kRow, Chunks>(dtype, call);
}

}  // namespace llmexport
