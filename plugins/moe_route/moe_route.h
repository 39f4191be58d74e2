// The best experts of every token; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

enum class Scoring { kSoftmax, kSoftmaxTopK, kSigmoid };

struct MoeRouteSizes {
  int64_t B, T, E;
  int64_t pitch = 0;  // from a token's logits to the next; 0 where they are dense
};

struct MoeRouteAttributes {
  int32_t topK;
  Scoring scoring;
  bool renormalise;
  float scale;
  int32_t groups, groupsKept, groupBest;
};

struct MoeRouteTensors {
  void const* logits;  // [B, T, E], or columns of another tensor
  void const* bias;    // [E] or null
  void* weights;       // [B, T, topK]
  int32_t* experts;    // [B, T, topK]
};

struct MoeRoutePlan {
  LaunchPlan launch;
  int perLane;  // experts of one thread
};

bool moeRouteFits(MoeRouteSizes const& sizes, MoeRouteAttributes const& attributes);
bool moeRouteServes(MoeRouteSizes const& sizes, MoeRouteAttributes const& attributes);

// With groups a row has a whole warp, even where fewer lanes would hold it.
MoeRoutePlan moeRoutePlan(MoeRouteSizes const& sizes, MoeRouteAttributes const& attributes);

cudaError_t moeRoute(Dtype dtype, MoeRouteSizes const& sizes, MoeRouteAttributes const& attributes,
                     MoeRouteTensors const& tensors, cudaStream_t stream);

}  // namespace llmexport
