#include <algorithm>

#include "common/refuse.h"
#include "normed_moe_route/normed_moe_route.cuh"
#include "normed_moe_route/normed_moe_route.h"

namespace llmexport {
namespace {

constexpr int kFewPerLane = 8, kMostPerLane = 16;  // experts of a lane, where a row has a warp
// Without clusters, up to so many rows several blocks share the columns of a tile.
constexpr int64_t kFewRows = 512;

int pitchOf(int64_t experts, bool gated) {
  return int(ceilDiv(experts + gated, kNormedRouteTile)) * kNormedRouteTile;
}

// As many groups of warps share the columns as there are warps that would have no logits.
int deepOf(int pitch) {
  int deep = kNormedRouteWarps;
  while (deep > 1 && kNormedRouteWarps / deep * kNormedRouteTile < pitch) deep /= 2;
  return deep;
}

size_t rowsBytes(NormedMoeRouteAttributes const& attributes, int64_t experts, int pitch, int rows) {
  size_t const perRow = size_t(pitch) * sizeof(float) +
                        size_t(attributes.route.topK) * sizeof(RouteWinner) +
                        size_t(experts) * sizeof(float);
  return perRow * size_t(rows);
}

size_t partialBytes(int deep, int pitch) {
  return size_t(deep) * kNormedRouteRows * size_t(pitch) * sizeof(float);
}

dim3 const kBlock(kWarp, kNormedRouteWarps);

}  // namespace

bool normedMoeRouteServes(NormedMoeRouteSizes const& s,
                          NormedMoeRouteAttributes const& attributes) {
  return moeRouteServes({1, s.tokens, s.E}, attributes.route) &&
         addRmsNormServes({1, s.tokens, s.C}) &&
         isAtMost("NormedMoeRoute", "BT", {s.tokens}, kMaxGridX - kNormedRouteParts);
}

NormedMoeRoutePlan normedMoeRoutePlan(NormedMoeRouteSizes const& s,
                                      NormedMoeRouteAttributes const& attributes, bool gated) {
  int const pitch = pitchOf(s.E, gated), deep = deepOf(pitch);
  int64_t const tiles = ceilDiv(s.tokens, kNormedRouteRows);
  int const parts = s.tokens <= kFewRows ? kNormedRouteParts : 1;
  int const own = kNormedRouteRows / kNormedRouteParts;
  size_t const ofCluster = partialBytes(deep, pitch) + rowsBytes(attributes, s.E, pitch, own);
  return {parts,
          deep,
          {dim3(unsigned(tiles * kNormedRouteParts)), kBlock, ofCluster, kNormedRouteParts},
          {dim3(unsigned(tiles * parts)), kBlock},
          {dim3(unsigned(ceilDiv(s.tokens, kNormedRouteWarps))), kBlock,
           rowsBytes(attributes, s.E, pitch, kNormedRouteWarps)}};
}

size_t normedMoeRouteWorkspace(NormedMoeRouteSizes const& s, bool gated) {
  int const pitch = pitchOf(s.E, gated);
  int64_t const tiles = ceilDiv(s.tokens, kNormedRouteRows);
  int64_t const few = std::min(tiles, kFewRows / kNormedRouteRows) * kNormedRouteParts;
  return size_t(std::max(tiles, few)) * partialBytes(deepOf(pitch), pitch);
}

namespace {

struct Arguments {
  NormedMoeRouteSizes const& sizes;
  NormedMoeRouteAttributes const& attributes;
  NormedMoeRouteTensors const& tensors;
  NormedMoeRoutePlan const& plan;
  Dtype dtype;
  Device const& device;
  cudaStream_t stream;
};

// Whether clusters run here: the GPU has them, and so has this kernel's code.
bool runsInClusters(Device const& device, [[maybe_unused]] void const* kernel) {
  constexpr int kFirst = 90;
  if (device.capability < kFirst || saysOfSm90a("0")) return false;
#ifdef LLMEXPORT_EMULATED
  return true;
#else
  int ptx = 0;
  return prepareKernel(kernel, ptx) == cudaSuccess && ptx >= kFirst;
#endif
}

template <class T, class L, class Key, int kPerLane>
cudaError_t run(Arguments const& a, NormedRouteCall<T> call) {
  auto const cluster = normedRouteClusterKernel<T, L, Key, kPerLane>;
  if (runsInClusters(a.device, reinterpret_cast<void const*>(cluster))) {
    call.parts = kNormedRouteParts;
    return launch(cluster, a.plan.cluster, a.stream, call);
  }
  NormedMoeRouteTensors const& t = a.tensors;
  cudaError_t error = addRmsNorm(a.dtype, {1, a.sizes.tokens, a.sizes.C}, a.attributes.norm,
                                 {t.x, t.residual, t.normWeight, nullptr, t.y, t.sum}, a.stream);
  if (error == cudaSuccess) {
    error = launch(normedRouteProductsKernel<T>, a.plan.products, a.stream, call);
  }
  if (error != cudaSuccess) return error;
  return launch(normedRouteKernel<T, L, Key, kPerLane>, a.plan.route, a.stream, call);
}

template <class T, class L, class Key>
cudaError_t run(Arguments const& a, NormedRouteCall<T> const& call) {
  return a.sizes.E <= kFewPerLane * kWarp ? run<T, L, Key, kFewPerLane>(a, call)
                                          : run<T, L, Key, kMostPerLane>(a, call);
}

}  // namespace

cudaError_t normedMoeRoute(Dtype dtype, NormedMoeRouteSizes const& s,
                           NormedMoeRouteAttributes const& attributes,
                           NormedMoeRouteTensors const& t, void* workspace, Device const& device,
                           cudaStream_t stream) {
  if (!normedMoeRouteServes(s, attributes)) return cudaErrorInvalidValue;
  if (s.tokens == 0) return cudaSuccess;
  bool const gated = t.gateWeight != nullptr;
  NormedMoeRoutePlan const plan = normedMoeRoutePlan(s, attributes, gated);
  Arguments const a{s, attributes, t, plan, dtype, device, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    bool const isAligned =
        aligned({t.x, t.residual, t.normWeight, t.routerWeight, t.gateWeight, t.y, t.sum});
    bool const vectors = isAligned && s.C % kFullWidth<T> == 0;
    NormedRouteCall<T> const call{typed<T>(t.x),
                                  typed<T>(t.residual),
                                  typed<T>(t.normWeight),
                                  typed<T>(t.routerWeight),
                                  typed<T>(t.routerBias),
                                  typed<T>(t.gateWeight),
                                  t.bias,
                                  typed<T>(t.y),
                                  typed<T>(t.sum),
                                  typed<T>(t.weights),
                                  t.experts,
                                  typed<float>(workspace),
                                  s.tokens,
                                  int(s.C),
                                  int(s.E),
                                  int(s.E) + gated,
                                  pitchOf(s.E, gated),
                                  plan.parts,
                                  vectors && sizeof(T) == 2 ? plan.deep : 1,
                                  vectors,
                                  attributes.norm,
                                  attributes.route};
    if constexpr (sizeof(T) == 2) {
      if (!attributes.wide && !t.bias && attributes.route.groups == 1) {
        return run<T, T, uint32_t>(a, call);
      }
      if (!attributes.wide) return run<T, T, uint64_t>(a, call);
    }
    return run<T, float, uint64_t>(a, call);
  });
}

}  // namespace llmexport
