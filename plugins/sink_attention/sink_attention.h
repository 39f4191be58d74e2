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

struct SinkAttentionTensors {
  void const *q, *k, *v;
  int32_t const *start, *length;
  void const* sinks;  // or null
  void* y;
};

// Which kernel attends. The rows of a group are the T queries of its H / G heads.
enum class AttentionPath {
  kScalar,   // a block a row: fp32, and tensors that the tensor cores' loads cannot take
  kDecode,   // 16 rows a block, whose warps share the keys
  kPrefill,  // many rows a block, whose warps share the rows
};

struct SinkAttentionPlan {
  AttentionPath path;
  LaunchPlan attend, merge;  // merge: only if there is more than one split
  int splits;                // of the keys, each with results of its own
  size_t workspaceBytes;
};

bool sinkAttentionFits(SinkAttentionSizes const& sizes);
bool sinkAttentionServes(SinkAttentionSizes const& sizes);

// Sizes are at least 1, except S, which may be 0.
SinkAttentionPlan sinkAttentionPlan(SinkAttentionSizes const& sizes,
                                    SinkAttentionAttributes const& attributes, Dtype dtype,
                                    bool pointersAligned, Device const& device);

// Bytes that suffice on any device for these sizes and all smaller B, T and S.
size_t sinkAttentionWorkspace(SinkAttentionSizes const& sizes,
                              SinkAttentionAttributes const& attributes, Dtype dtype);

// `workspace` has the plan's bytes and is aligned to kVectorBytes.
cudaError_t sinkAttention(Dtype dtype, SinkAttentionSizes const& sizes,
                          SinkAttentionAttributes const& attributes,
                          SinkAttentionTensors const& tensors, void* workspace,
                          Device const& device, cudaStream_t stream);

}  // namespace llmexport
