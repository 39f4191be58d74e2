#include "moe_route/moe_route.cuh"

namespace llmexport {

MoeRoutePlan moeRoutePlan(int64_t rows, int64_t experts, Dtype dtype, bool spread,
                          bool pointersAligned) {
  constexpr int kFew = 8, kMany = 16;
  int const perLane = experts <= kFew * kWarp ? kFew : kMany;
  int const full = kVectorBytes / int(sizeOf(dtype));
  int const width = pointersAligned && experts % full == 0 ? full : 1;
  unsigned lanes = spread ? kWarp : 1;
  while (lanes * perLane < experts) lanes *= 2;
  unsigned const rowsPerBlock = kRouteThreads / lanes;
  return {{dim3(unsigned(ceilDiv(rows, rowsPerBlock))), dim3(lanes, rowsPerBlock)}, width, perLane};
}

namespace {

template <class T, class Key, int kPerLane, bool kGrouped>
cudaError_t start(MoeRoutePlan const& plan, MoeRouteArguments<T> const& a, cudaStream_t stream) {
  auto const kernel = plan.width > 1 ? moeRouteKernel<T, Key, kPerLane, kFullWidth<T>, kGrouped>
                                     : moeRouteKernel<T, Key, kPerLane, 1, kGrouped>;
  return launch(kernel, plan.launch, stream, a);
}

template <class T, class Key, bool kGrouped>
cudaError_t startFor(MoeRoutePlan const& plan, MoeRouteArguments<T> const& a, cudaStream_t stream) {
  return plan.perLane == 8 ? start<T, Key, 8, kGrouped>(plan, a, stream)
                           : start<T, Key, 16, kGrouped>(plan, a, stream);
}

}  // namespace

cudaError_t moeRoute(Dtype dtype, int64_t rows, int64_t experts,
                     MoeRouteAttributes const& attributes, void const* logits, void const* bias,
                     void* weights, int32_t* chosen, cudaStream_t stream) {
  if (rows * attributes.topK == 0) return cudaSuccess;
  if (rows > kMaxGridX || experts > kRouteMaxExperts || attributes.topK > experts ||
      attributes.groups > kRouteMaxGroups) {
    return cudaErrorInvalidValue;
  }
  bool const grouped = attributes.groups > 1;
  auto const plan = moeRoutePlan(rows, experts, dtype, grouped, aligned({logits}));
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    MoeRouteArguments<T> const a{static_cast<T const*>(logits),
                                 static_cast<T const*>(bias),
                                 static_cast<T*>(weights),
                                 chosen,
                                 rows,
                                 int(experts),
                                 attributes};
    if (grouped) return startFor<T, uint64_t, true>(plan, a, stream);
    if constexpr (sizeof(T) == 2) {
      if (!bias) return startFor<T, uint32_t, false>(plan, a, stream);
    }
    return startFor<T, uint64_t, false>(plan, a, stream);
  });
}

}  // namespace llmexport
