// Attention with sinks, window and soft cap; its meaning is in __init__.py.
#pragma once

#include "common/device.h"
#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

constexpr int kAttentionMaxSize = 256;  // of a head

struct SinkAttentionSizes {
  int64_t B, H, G, T, S, D;
};

struct SinkAttentionAttributes {
  float scale, softcap;
  int window;
};

// Which kernel attends. The rows of a group are the T queries of its H / G heads.
enum class AttentionPath {
  kScalar,   // a block a row: fp32, and what the tensor cores' loads cannot take
  kDecode,   // 16 rows a block, whose warps share the keys
  kPrefill,  // many rows a block, whose warps share the rows
};

struct SinkAttentionPlan {
  AttentionPath path;
  LaunchPlan attend, merge;  // merge: only if there is more than one split
  int splits;                // of the keys, each with results of its own
  size_t workspaceBytes;
};

// For sizes of at least one element each, but S; on a device of so many SMs.
SinkAttentionPlan sinkAttentionPlan(SinkAttentionSizes const& sizes, int window, Dtype dtype,
                                    bool pointersAligned, int processors);

// Bytes that suffice on any device for these sizes and all smaller B, T and S.
size_t sinkAttentionWorkspace(SinkAttentionSizes const& sizes, int window, Dtype dtype);

// `sinks` may be null. `workspace`: of sinkAttentionPlan's bytes, aligned to kVectorBytes.
cudaError_t sinkAttention(Dtype dtype, SinkAttentionSizes const& sizes,
                          SinkAttentionAttributes const& attributes, void const* q, void const* k,
                          void const* v, void const* start, void const* length, void const* sinks,
                          void* y, void* workspace, Device const& device, cudaStream_t stream);

}  // namespace llmexport
