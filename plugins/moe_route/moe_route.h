// The best experts of every token; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

enum class Scoring { kSoftmax, kSoftmaxTopK, kSigmoid };

struct MoeRouteSizes {
  int64_t B, T, E;
  int64_t pitch = 0;  // from a token's logits, and its gate, to the next; 0 where they are dense
};

struct MoeRouteAttributes {
  int32_t topK;
  Scoring scoring;
  bool renormalise;
  float scale;
  int32_t groups, groupsKept, groupBest;
  // Experts E, E + 1, ... that every token has behind its topK.
  int32_t always = 0;
  __host__ __device__ int32_t slots() const { return topK + always; }
};

struct MoeRouteTensors {
  void const* logits;  // [B, T, E], or columns of another tensor
  void const* bias;    // [E] or null
  void* weights;       // [B, T, slots]
  int32_t* experts;    // [B, T, slots]
  // [B, T]: its sigmoid is the weight of the experts that are always there; 1 if it is null.
  void const* gate = nullptr;
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
