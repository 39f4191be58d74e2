#include "common/refuse.h"
#include "moe_route/moe_route.cuh"

namespace llmexport {
namespace {

constexpr int kFewPerLane = 8, kMostPerLane = 16;  // experts that a thread holds in registers
constexpr int64_t kMostExperts = kMostPerLane * kWarp;

}  // namespace

bool moeRouteFits(MoeRouteSizes const& s, MoeRouteAttributes const& a) {
  long long const E = s.E;
  if (a.groups < 1 || a.groupsKept < 1 || a.groupsKept > a.groups) {
    return refuse("MoeRoute: %d of %d groups are kept", a.groupsKept, a.groups);
  }
  if (a.groupBest < 1 || a.groupBest > 2) {
    return refuse("MoeRoute: the %d best choices of a group, 1 or 2 are summed", a.groupBest);
  }
  if (E == kUnknown) return true;
  if (a.topK > E) return refuse("MoeRoute: top_k is %d, but there are E = %lld experts", a.topK, E);
  if (a.groups > 1 && (E % a.groups != 0 || E / a.groups < 2)) {
    return refuse("MoeRoute: E = %lld experts are not %d groups of two or more", E, a.groups);
  }
  return true;
}

bool moeRouteServes(MoeRouteSizes const& s, MoeRouteAttributes const& a) {
  if (!moeRouteFits(s, a)) return false;
  if (s.E > kMostExperts) {
    return refuse("MoeRoute: E = %lld experts, the kernel holds %lld", (long long)s.E,
                  (long long)kMostExperts);
  }
  if (a.groups > kWarp) {
    return refuse("MoeRoute: %d groups, the kernel has a lane for %d", a.groups, kWarp);
  }
  return isAtMost("MoeRoute", "BT", {s.B, s.T}, kMaxGridX);
}

MoeRoutePlan moeRoutePlan(MoeRouteSizes const& s, MoeRouteAttributes const& attributes) {
  int const perLane = s.E <= kFewPerLane * kWarp ? kFewPerLane : kMostPerLane;
  bool const grouped = attributes.groups > 1;
  unsigned lanes = grouped ? kWarp : 1;
  while (lanes * perLane < s.E) lanes *= 2;
  unsigned const rowsPerBlock = kRouteThreads / lanes;
  size_t const rowBytes =
      size_t(attributes.topK) * sizeof(RouteWinner) + (grouped ? size_t(s.E) * sizeof(float) : 0);
  return {{dim3(unsigned(ceilDiv(s.B * s.T, rowsPerBlock))), dim3(lanes, rowsPerBlock),
           rowsPerBlock * rowBytes},
          perLane};
}

namespace {

template <class T, class Key>
cudaError_t start(MoeRoutePlan const& plan, MoeRouteArguments<T> const& a, cudaStream_t stream) {
  auto const kernel = plan.perLane == kFewPerLane ? moeRouteKernel<T, Key, kFewPerLane>
                                                  : moeRouteKernel<T, Key, kMostPerLane>;
  return launch(kernel, plan.launch, stream, a);
}

}  // namespace

cudaError_t moeRoute(Dtype dtype, MoeRouteSizes const& s, MoeRouteAttributes const& attributes,
                     MoeRouteTensors const& t, cudaStream_t stream) {
  if (!moeRouteServes(s, attributes)) return cudaErrorInvalidValue;
  if (s.B * s.T * attributes.slots() == 0) return cudaSuccess;
  auto const plan = moeRoutePlan(s, attributes);
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    int64_t const pitch = s.pitch ? s.pitch : s.E;
    bool const vectors = s.E % kFullWidth<T> == 0 && pitch % kFullWidth<T> == 0;
    MoeRouteArguments<T> const a{typed<T>(t.logits),
                                 typed<T>(t.bias),
                                 typed<T>(t.gate),
                                 typed<T>(t.weights),
                                 t.experts,
                                 s.B * s.T,
                                 pitch,
                                 s.pitch ? s.pitch : 1,
                                 int(s.E),
                                 aligned({t.logits}) && vectors,
                                 attributes};
    if constexpr (sizeof(T) == 2) {
      if (!t.bias && attributes.groups == 1) return start<T, uint32_t>(plan, a, stream);
    }
    return start<T, uint64_t>(plan, a, stream);
  });
}

}  // namespace llmexport
