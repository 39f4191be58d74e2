// The best experts of every token; its meaning is in __init__.py.
#pragma once

#include "common/dtype.h"
#include "common/launch_plan.h"

namespace llmexport {

constexpr int64_t kRouteMaxExperts = 512;    // that a warp holds in registers, 16 a lane
constexpr int64_t kRouteMaxGroups = kWarp;  // a lane each

enum class Scoring { kSoftmax, kSoftmaxTopK, kSigmoid };

struct MoeRouteAttributes {
  int32_t topK;
  Scoring scoring;
  bool renormalise;
  float scale;
  int32_t groups, groupsKept;
};

struct MoeRoutePlan {
  LaunchPlan launch;
  int perLane;  // experts of one thread
};

// With groups a row has a whole warp, even where fewer lanes would hold it.
MoeRoutePlan moeRoutePlan(int64_t rows, int64_t experts, MoeRouteAttributes const& attributes);

// logits [rows, experts], bias [experts] or null, weights and chosen [rows, topK].
cudaError_t moeRoute(Dtype dtype, int64_t rows, int64_t experts,
                     MoeRouteAttributes const& attributes, void const* logits, void const* bias,
                     void* weights, int32_t* chosen, cudaStream_t stream);

}  // namespace llmexport
