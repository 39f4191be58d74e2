// AddRmsNorm, the products of a router, and MoeRoute; plugins/normed_route.py says what its plugins
// compute.
#pragma once

#include "add_rms_norm/add_rms_norm.h"
#include "common/device.h"
#include "moe_route/moe_route.h"

namespace llmexport {

struct NormedMoeRouteSizes {
  int64_t tokens, C, E;
};

struct NormedMoeRouteAttributes {
  MoeRouteAttributes route;
  AddRmsNormAttributes norm;
  bool wide;  // logits stay in fp32
};

// x, residual, y and sum are [tokens, C], normWeight [C], routerWeight [E, C], routerBias [E],
// weights and experts [tokens, slots]. Null where there is none: gateWeight [C], that of the gate
// of the experts that are always there, and bias [E], of the choice.
struct NormedMoeRouteTensors {
  void const *x, *residual, *normWeight, *routerWeight, *routerBias, *gateWeight;
  float const* bias;
  void *y, *sum, *weights;
  int32_t* experts;
};

// Blocks that share the columns of a tile of tokens.
constexpr int kNormedRouteParts = 8;

struct NormedMoeRoutePlan {
  int parts;  // of the columns of a tile
  int deep;   // of a part's columns, for which warps have sums of their own on tensor cores
  // Without clusters AddRmsNorm's own launch comes first, then `products` and `route`.
  LaunchPlan cluster, products, route;
};

bool normedMoeRouteServes(NormedMoeRouteSizes const& sizes,
                          NormedMoeRouteAttributes const& attributes);

NormedMoeRoutePlan normedMoeRoutePlan(NormedMoeRouteSizes const& sizes,
                                      NormedMoeRouteAttributes const& attributes, bool gated);

// Bytes that suffice for these sizes and fewer tokens, on GPUs that have no clusters.
size_t normedMoeRouteWorkspace(NormedMoeRouteSizes const& sizes, bool gated);

// `workspace` has these bytes and is aligned to kVectorBytes.
cudaError_t normedMoeRoute(Dtype dtype, NormedMoeRouteSizes const& sizes,
                           NormedMoeRouteAttributes const& attributes,
                           NormedMoeRouteTensors const& tensors, void* workspace,
                           Device const& device, cudaStream_t stream);

}  // namespace llmexport
