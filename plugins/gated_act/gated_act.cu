#include "gated_act/gated_act.cuh"

namespace llmexport {

GatedActPlan gatedActPlan(int64_t count, Dtype dtype, bool pointersAligned) {
  int const width = pointersAligned ? kVectorBytes / int(sizeOf(dtype)) : 1;
  int64_t const blocks = ceilDiv(count, kGatedActThreads * kGatedActVectors * width);
  return {{dim3(unsigned(blocks)), dim3(kGatedActThreads)}, width};
}

namespace {

struct Arguments {
  GatedActPlan plan;
  int64_t count;
  void const *gate, *up;
  void* y;
  cudaStream_t stream;
};

template <class T, class Act>
cudaError_t start(Arguments const& a, Act act) {
  auto const kernel =
      a.plan.width > 1 ? gatedActKernel<T, kFullWidth<T>, Act> : gatedActKernel<T, 1, Act>;
  return launch(kernel, a.plan.launch, a.stream, static_cast<T const*>(a.gate),
                static_cast<T const*>(a.up), static_cast<T*>(a.y), a.count, act);
}

}  // namespace

cudaError_t gatedAct(Dtype dtype, int64_t count, Activation activation, float alpha, float limit,
                     void const* gate, void const* up, void* y, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  GatedActPlan const plan = gatedActPlan(count, dtype, aligned({gate, up, y}));
  if (ceilDiv(count, kGatedActThreads * kGatedActVectors * plan.width) > kMaxGridX) {
    return cudaErrorInvalidValue;
  }
  Arguments const arguments{plan, count, gate, up, y, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (activation) {
      case Activation::kSilu:
        return start<T>(arguments, Silu<T>{});
      case Activation::kGeluTanh:
        return start<T>(arguments, GeluTanh<T>{});
      case Activation::kGeluErf:
        return start<T>(arguments, GeluErf<T>{});
      case Activation::kSwigluClamped:
        return start<T>(arguments, SwigluClamped<T>{alpha, limit});
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace llmexport
