#include <algorithm>

#include "gated_delta_rule/gated_delta_rule.cuh"
#include "gated_delta_rule/limits.h"

namespace llmexport {
namespace {

// Up to so many tokens the recurrence is at least as fast: a chunk takes two launches and the time
// of about as many of its steps (reckoned, not measured).
constexpr int64_t kFewTokens = 16;

bool hasChunks(GatedDeltaRuleSizes const& sizes, Dtype dtype) {
  bool const wide = sizes.D == 64 || sizes.D == 128;  // two warps' halves of whole tiles
  return dtype != Dtype::kFloat32 && wide && sizes.T > kFewTokens;
}

size_t prepareSharedBytes(GatedDeltaRuleSizes const& sizes, Dtype dtype) {
  return std::max(2 * kChunk * size_t(sizes.D) * sizeOf(dtype), sizeof(ChunkSystem));
}

size_t scanSharedBytes(GatedDeltaRuleSizes const& sizes) {
  return sizes.D == 64 ? sizeof(ScanShared<Half, 64>) : sizeof(ScanShared<Half, 128>);
}

struct Arguments {
  GatedDeltaRulePlan const& plan;
  GatedDeltaRuleSizes const& sizes;
  GatedDeltaRuleAttributes const& attributes;
  GatedDeltaRuleTensors const& tensors;
  void* workspace;
  cudaStream_t stream;
};

template <class T, bool kVectors>
cudaError_t startRecurrence(Arguments const& a) {
  GatedDeltaRuleTensors const& t = a.tensors;
  return launch(recurrenceKernel<T, kVectors, DecayOf::kHead>, a.plan.recurrence, a.stream,
                typed<T>(t.q), typed<T>(t.k), typed<T>(t.v), t.g, typed<T>(t.beta), t.state,
                typed<T>(t.y), t.nextState, a.sizes.T, int(a.sizes.G), int(a.sizes.D),
                int(a.sizes.V), a.attributes.scale, a.attributes.l2Norm);
}

template <class T, int D>
cudaError_t startChunks(Arguments const& a) {
  GatedDeltaRuleTensors const& t = a.tensors;
  auto* const records = typed<ChunkRecord>(a.workspace);
  cudaError_t const error = launch(prepareKernel<T, D>, a.plan.prepare, a.stream, typed<T>(t.q),
                                   typed<T>(t.k), t.g, typed<T>(t.beta), records, a.sizes.T,
                                   int(a.sizes.G), a.attributes.scale, a.attributes.l2Norm);
  if (error != cudaSuccess) return error;
  return launch(scanKernel<T, D>, a.plan.scan, a.stream, typed<T>(t.q), typed<T>(t.k),
                typed<T>(t.v), t.state, records, typed<T>(t.y), t.nextState, a.sizes.T,
                int(a.sizes.G), int(a.sizes.V));
}

}  // namespace

bool gatedDeltaRuleFits(GatedDeltaRuleSizes const& s) {
  if (s.G == kUnknown || s.H == kUnknown || (s.G > 0 && s.H % s.G == 0)) return true;
  return refuse("GatedDeltaRule: v has H = %lld heads, no multiple of the G = %lld of q and k",
                (long long)s.H, (long long)s.G);
}

bool gatedDeltaRuleServes(GatedDeltaRuleSizes const& s) {
  return gatedDeltaRuleFits(s) && deltaRuleServes("GatedDeltaRule", s.B, s.T, s.H, s.D, s.V);
}

GatedDeltaRulePlan gatedDeltaRulePlan(GatedDeltaRuleSizes const& sizes, Dtype dtype,
                                      bool pointersAligned) {
  unsigned const H = unsigned(sizes.H), B = unsigned(sizes.B);
  GatedDeltaRulePlan plan{};
  plan.chunked = pointersAligned && hasChunks(sizes, dtype);
  plan.width = pointersAligned ? kThreadColumns : 1;
  if (!plan.chunked) {
    unsigned const slices = unsigned(ceilDiv(sizes.V, kRecurrenceColumns));
    plan.recurrence = {dim3(slices, H, B), dim3(kRecurrenceThreads)};
    return plan;
  }
  plan.prepare = {dim3(unsigned(ceilDiv(sizes.T, kChunk)), H, B), dim3(kChunkThreads),
                  prepareSharedBytes(sizes, dtype)};
  plan.scan = {dim3(unsigned(ceilDiv(sizes.V, kScanColumns)), H, B), dim3(kChunkThreads),
               scanSharedBytes(sizes)};
  return plan;
}

size_t gatedDeltaRuleWorkspace(GatedDeltaRuleSizes const& sizes, Dtype dtype) {
  if (!hasChunks(sizes, dtype)) return 0;
  return size_t(sizes.B * sizes.H * ceilDiv(sizes.T, kChunk)) * sizeof(ChunkRecord);
}

cudaError_t gatedDeltaRule(Dtype dtype, GatedDeltaRuleSizes const& s,
                           GatedDeltaRuleAttributes const& attributes,
                           GatedDeltaRuleTensors const& t, void* workspace, cudaStream_t stream) {
  if (!gatedDeltaRuleServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H == 0) return cudaSuccess;
  bool const pointersAligned = aligned({t.q, t.k, t.v, t.state, t.y, t.nextState});
  auto const plan = gatedDeltaRulePlan(s, dtype, pointersAligned);
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
