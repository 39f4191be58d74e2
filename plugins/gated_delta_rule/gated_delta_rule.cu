#include <algorithm>

#include "gated_delta_rule/gated_delta_rule.cuh"
#include "gated_delta_rule/limits.h"
#include "gated_delta_rule/start.cuh"

namespace llmexport {
namespace {

size_t prepareSharedBytes(GatedDeltaRuleSizes const& sizes, Dtype dtype) {
  return std::max(2 * kChunk * size_t(sizes.D) * sizeOf(dtype), sizeof(ChunkSystem));
}

size_t scanSharedBytes(GatedDeltaRuleSizes const& sizes) {
  return sizes.D == 64 ? sizeof(ScanShared<Half, 64>) : sizeof(ScanShared<Half, 128>);
}

using Call = DeltaRuleCall<GatedDeltaRuleSizes>;

struct Chunks {
  template <class T, int D>
  static cudaError_t start(Call const& c) {
    DeltaRuleTensors const& t = c.tensors;
    auto* const records = typed<ChunkRecord>(c.workspace);
    cudaError_t const error =
        launch(prepareKernel<T, D>, c.plan.prepare, c.stream, typed<T>(t.q), typed<T>(t.k), t.g,
               typed<T>(t.beta), records, t.keyStride, c.sizes.T, c.keyHeads, c.attributes.scale,
               c.attributes.l2Norm);
    if (error != cudaSuccess) return error;
    return launch(scanKernel<T, D>, c.plan.scan, c.stream, typed<T>(t.q), typed<T>(t.k),
                  typed<T>(t.v), t.state, records, typed<T>(t.y), t.nextState, t.keyStride,
                  t.valueStride, c.sizes.T, c.keyHeads, int(c.sizes.V));
  }
};

}  // namespace

bool gatedDeltaRuleFits(GatedDeltaRuleSizes const& s) {
  if (s.G == kUnknown || s.H == kUnknown || (s.G > 0 && s.H % s.G == 0)) return true;
  return refuse("GatedDeltaRule: v has H = %lld heads, no multiple of the G = %lld of q and k",
                (long long)s.H, (long long)s.G);
}

bool gatedDeltaRuleServes(GatedDeltaRuleSizes const& s) {
  return gatedDeltaRuleFits(s) && deltaRuleServes("GatedDeltaRule", s.B, s.T, s.H, s.D, s.V);
}

DeltaRulePlan gatedDeltaRulePlan(GatedDeltaRuleSizes const& sizes, Dtype dtype,
                                 bool pointersAligned) {
  DeltaRulePlan plan = recurrencePlan(sizes, dtype, pointersAligned);
  if (!plan.chunked) return plan;
  unsigned const H = unsigned(sizes.H), B = unsigned(sizes.B);
  plan.prepare = {dim3(unsigned(ceilDiv(sizes.T, kChunk)), H, B), dim3(kChunkThreads),
                  prepareSharedBytes(sizes, dtype)};
  plan.scan = {dim3(unsigned(ceilDiv(sizes.V, kScanColumns)), H, B), dim3(kScanThreads),
               scanSharedBytes(sizes)};
  return plan;
}

size_t gatedDeltaRuleWorkspace(GatedDeltaRuleSizes const& sizes, Dtype dtype) {
  if (!hasChunks(sizes, dtype)) return 0;
  return size_t(sizes.B * sizes.H * ceilDiv(sizes.T, kChunk)) * sizeof(ChunkRecord);
}

cudaError_t gatedDeltaRule(Dtype dtype, GatedDeltaRuleSizes const& s,
                           DeltaRuleAttributes const& attributes, DeltaRuleTensors const& t,
                           void* workspace, cudaStream_t stream) {
  if (!gatedDeltaRuleServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  bool const pointersAligned = aligned({t.q, t.k, t.v, t.state, t.y, t.nextState});
  auto const plan = gatedDeltaRulePlan(s, dtype, pointersAligned);
  Call const call{plan, s, int(s.G), attributes, t, workspace, stream};
  return startDeltaRule<DecayOf::kHead, Chunks>(dtype, call);
}

}  // namespace llmexport
