#include "moe_route/moe_route.cuh"

namespace llmexport {

MoeRoutePlan moeRoutePlan(int64_t rows, int64_t experts, MoeRouteAttributes const& attributes) {
  constexpr int kFew = 8, kMany = 16;
  int const perLane = experts <= kFew * kWarp ? kFew : kMany;
  bool const grouped = attributes.groups > 1;
  unsigned lanes = grouped ? kWarp : 1;
  while (lanes * perLane < experts) lanes *= 2;
  unsigned const rowsPerBlock = kRouteThreads / lanes;
  size_t const rowBytes = size_t(attributes.topK) * sizeof(RouteWinner) +
                          (grouped ? size_t(experts) * sizeof(float) : 0);
  return {{dim3(unsigned(ceilDiv(rows, rowsPerBlock))), dim3(lanes, rowsPerBlock),
           rowsPerBlock * rowBytes},
          perLane};
}

namespace {

template <class T, class Key>
cudaError_t start(MoeRoutePlan const& plan, MoeRouteArguments<T> const& a, cudaStream_t stream) {
  auto const kernel = plan.perLane == 8 ? moeRouteKernel<T, Key, 8> : moeRouteKernel<T, Key, 16>;
  return launch(kernel, plan.launch, stream, a);
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
  auto const plan = moeRoutePlan(rows, experts, attributes);
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    MoeRouteArguments<T> const a{static_cast<T const*>(logits),
                                 static_cast<T const*>(bias),
                                 static_cast<T*>(weights),
                                 chosen,
                                 rows,
                                 int(experts),
                                 aligned({logits}) && experts % kFullWidth<T> == 0,
                                 attributes};
    if constexpr (sizeof(T) == 2) {
      if (!bias && attributes.groups == 1) return start<T, uint32_t>(plan, a, stream);
    }
    return start<T, uint64_t>(plan, a, stream);
  });
}

}  // namespace llmexport
