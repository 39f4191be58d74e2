#include <algorithm>

#include "common/refuse.h"
#include "sink_attention/decode.cuh"
#include "sink_attention/merge.cuh"
#include "sink_attention/prefill.cuh"
#include "sink_attention/prefill_sm90a.h"
#include "sink_attention/scalar.cuh"

namespace llmexport {
namespace {

// Up to so many rows, blocks of 16 read the keys no more than twice.
constexpr int64_t kDecodeRows = 2 * 16;
// Keys are split as long as there are fewer blocks for each SM; the workspace is for so many SMs at
// most.
constexpr int64_t kBlocksPerProcessor = 2, kMostProcessors = 160;
constexpr int64_t kMostWanted = kBlocksPerProcessor * kMostProcessors;
static_assert(kMostWanted <= kAttentionMaxSplits);
// Least keys of a split. With fewer it would write, and the merge read, too many bytes of results
// for the bytes of keys that it reads; a prefill block has more rows, and so more results.
constexpr int64_t kDecodeLeastKeys = 128, kPrefillLeastKeys = 256;

// The least head size that the kernels are made for and that holds this one.
int paddedSize(int64_t size) { return size <= 64 ? 64 : size <= 128 ? 128 : 256; }

// Calls `function` with the head size as a constant.
template <class F>
auto withSize(int64_t size, F function) {
  switch (paddedSize(size)) {
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 128:
      return function(std::integral_constant<int, 128>{});
    default:
      return function(std::integral_constant<int, 256>{});
  }
}

struct BlockShape {
  int rows;
  size_t sharedBytes;
};

BlockShape blockShape(AttentionPath path, int64_t size) {
  return withSize(size, [&](auto padded) -> BlockShape {
    constexpr int kD = decltype(padded)::value;
    if (path == AttentionPath::kDecode) {
      return {DecodeShape<kD>::kRows, DecodeShape<kD>::kSharedBytes};
    }
    return {PrefillShape<kD>::kRows, PrefillShape<kD>::kSharedBytes};
  });
}

// How many keys the rows of one block can see.
int64_t mostKeys(SinkAttentionSizes const& s, int window, int64_t rows) {
  int64_t const queries = std::min(s.T, ceilDiv(rows, s.H / s.G) + 1);
  return window > 0 ? std::min(s.S, int64_t(window) + queries - 1) : s.S;
}

size_t splitBytes(int64_t rows, int64_t size) { return size_t(rows * (size + 1)) * sizeof(float); }

bool onTensorCores(int64_t size, Dtype dtype, bool pointersAligned) {
  return dtype != Dtype::kFloat32 && pointersAligned && size % (kVectorBytes / 2) == 0;
}

}  // namespace

bool sinkAttentionFits(SinkAttentionSizes const& s) {
  if (s.H == kUnknown || s.G == kUnknown || (s.G > 0 && s.H % s.G == 0)) return true;
  return refuse("SinkAttention: q has H = %lld heads, no multiple of the G = %lld of k and v",
                (long long)s.H, (long long)s.G);
}

bool sinkAttentionServes(SinkAttentionSizes const& s) {
  if (!sinkAttentionFits(s)) return false;
  if (s.D > kAttentionMaxSize) {
    return refuse("SinkAttention: heads have D = %lld, over the %d that the kernels are made for",
                  (long long)s.D, kAttentionMaxSize);
  }
  return isAtMost("SinkAttention", "BHT", {s.B, s.H, s.T}, INT32_MAX) &&
         isAtMost("SinkAttention", "S", {s.S}, INT32_MAX);
}

SinkAttentionPlan sinkAttentionPlan(SinkAttentionSizes const& s,
                                    SinkAttentionAttributes const& attributes, Dtype dtype,
                                    bool pointersAligned, Device const& device) {
  dim3 const block(kAttentionThreads);
  if (!onTensorCores(s.D, dtype, pointersAligned)) {
    return {AttentionPath::kScalar, {dim3(unsigned(s.B * s.H * s.T)), block}, {}, 1, 0};
  }
  int64_t const rows = s.H / s.G * s.T;
  bool const few = rows <= kDecodeRows;
  auto const path = few ? AttentionPath::kDecode : AttentionPath::kPrefill;
  BlockShape const shape = blockShape(path, s.D);
  int64_t const blocks = s.B * s.G * ceilDiv(rows, shape.rows);
  // A decode block waits for memory, so that one too many is better than one too few.
  int64_t const most = kBlocksPerProcessor * std::min<int64_t>(device.processors, kMostProcessors);
  int64_t const wanted = few ? ceilDiv(most, blocks) : most / blocks;
  int64_t const keys = mostKeys(s, attributes.window, shape.rows);
  int64_t const possible = ceilDiv(keys, few ? kDecodeLeastKeys : kPrefillLeastKeys);
  int64_t const splits = std::max<int64_t>(std::min(wanted, possible), 1);
  int64_t const all = s.B * s.H * s.T;
  SinkAttentionPlan plan{path,
                         {dim3(unsigned(blocks), unsigned(splits)), block, shape.sharedBytes},
                         {},
                         int(splits),
                         0};
  if (splits > 1) {
    plan.merge = {dim3(unsigned(all)), block};
    plan.workspaceBytes = splitBytes(all * splits, s.D);
  }
  return plan;
}

size_t sinkAttentionWorkspace(SinkAttentionSizes const& s,
                              SinkAttentionAttributes const& attributes, Dtype dtype) {
  if (!onTensorCores(s.D, dtype, true) || s.B * s.H * s.T * s.S == 0) return 0;
  // Keys are split only where that makes no more blocks than these, each with all its rows.
  int64_t const decode = 2 * kMostWanted * blockShape(AttentionPath::kDecode, s.D).rows;
  int64_t const prefill = kMostWanted * blockShape(AttentionPath::kPrefill, s.D).rows;
  int64_t const keys = mostKeys(s, attributes.window, s.H / s.G * s.T);
  int64_t const splits = std::min(ceilDiv(keys, kDecodeLeastKeys), kMostWanted);
  int64_t const rows = std::min(s.B * s.H * s.T * splits, std::max(decode, prefill));
  return splits > 1 ? splitBytes(rows, s.D) : 0;
}

namespace {

template <class T>
cudaError_t attendOnTensorCores(SinkAttentionPlan const& plan,
                                [[maybe_unused]] SinkAttentionSizes const& sizes,
                                AttentionCall<T> const& call, [[maybe_unused]] Device const& device,
                                cudaStream_t stream) {
#ifdef LLMEXPORT_SM90A
  if (sm90aServes(plan, sizes, device) && takesPingPong()) {
    return launchPingPongPrefill(sizes, call, stream);
  }
  if (sm90aServes(plan, sizes, device) && takesWgmma(sm90aIsFaster(sizes, call.window))) {
    return launchSm90aPrefill(sizes, call, stream);
  }
#endif
  return withSize(call.size, [&](auto padded) {
    constexpr int kD = decltype(padded)::value;
    auto const kernel = plan.path == AttentionPath::kDecode ? sinkAttentionDecodeKernel<T, kD>
                                                            : sinkAttentionPrefillKernel<T, kD>;
    return launch(kernel, plan.attend, stream, call);
  });
}

template <class T>
cudaError_t attend(SinkAttentionPlan const& plan, SinkAttentionSizes const& sizes,
                   AttentionCall<T> const& call, Device const& device, cudaStream_t stream) {
  if (plan.path == AttentionPath::kScalar) {
    // Tensors of 16 bits come here only if they are not aligned.
    constexpr int kWidth = sizeof(T) == 4 ? kFullWidth<T> : 1;
    bool const wide = aligned({call.k}) && call.size % kWidth == 0;
    auto const kernel =
        wide ? sinkAttentionScalarKernel<T, kWidth> : sinkAttentionScalarKernel<T, 1>;
    return launch(kernel, plan.attend, stream, call);
  }
  if constexpr (sizeof(T) == 4) {
    return cudaErrorInvalidValue;
  } else {
    cudaError_t const error = attendOnTensorCores(plan, sizes, call, device, stream);
    if (error != cudaSuccess || plan.splits == 1) return error;
    return launchEarly(sinkAttentionMergeKernel<T>, plan.merge, stream, call);
  }
}

}  // namespace

cudaError_t sinkAttention(Dtype dtype, SinkAttentionSizes const& s,
                          SinkAttentionAttributes const& attributes, SinkAttentionTensors const& t,
                          void* workspace, Device const& device, cudaStream_t stream) {
  if (!sinkAttentionServes(s)) return cudaErrorInvalidValue;
  int64_t const rows = s.B * s.H * s.T;
  if (rows * s.D == 0) return cudaSuccess;
  SinkAttentionPlan const plan =
      sinkAttentionPlan(s, attributes, dtype, aligned({t.q, t.k, t.v, t.y}), device);
  float const unit = plan.path == AttentionPath::kScalar ? 1.0f : kLog2e;
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    AttentionCall<T> call{};
    call.q = typed<T>(t.q);
    call.k = typed<T>(t.k);
    call.v = typed<T>(t.v);
    call.start = t.start;
    call.length = t.length;
    call.sinks = typed<T>(t.sinks);
    call.y = typed<T>(t.y);
    call.partial = typed<float>(workspace);
    call.logWeight = call.partial + rows * plan.splits * s.D;
    call.batches = int(s.B);
    call.heads = int(s.H);
    call.groups = int(s.G);
    call.ratio = int(s.H / s.G);
    call.tokens = int(s.T);
    call.keys = int(s.S);
    call.size = int(s.D);
    call.splits = plan.splits;
    call.window = attributes.window > 0 ? attributes.window : INT32_MAX;
    call.scale = attributes.scale * unit;
    call.softcap = attributes.softcap * unit;
    return attend(plan, s, call, device, stream);
  });
}

}  // namespace llmexport
