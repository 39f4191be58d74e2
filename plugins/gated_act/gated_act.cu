#include "common/refuse.h"
#include "gated_act/gated_act.cuh"

namespace llmexport {

bool gatedActServes(GatedActSizes const& s) {
  // Where an access has one element.
  constexpr int64_t kMost = kMaxGridX * kGatedActThreads * kGatedActVectors;
  return isAtMost("GatedAct", "BTI", {s.B, s.T, s.I}, kMost);
}

GatedActPlan gatedActPlan(GatedActSizes const& s, Dtype dtype, bool pointersAligned) {
  int const width = pointersAligned ? kVectorBytes / int(sizeOf(dtype)) : 1;
  int64_t const blocks = ceilDiv(s.B * s.T * s.I, kGatedActThreads * kGatedActVectors * width);
  return {{dim3(unsigned(blocks)), dim3(kGatedActThreads)}, width};
}

namespace {

struct Arguments {
  GatedActPlan const& plan;
  int64_t count;
  GatedActTensors const& tensors;
  cudaStream_t stream;
};

template <class T, class Act>
cudaError_t start(Arguments const& a, Act act) {
  auto const kernel =
      a.plan.width > 1 ? gatedActKernel<T, kFullWidth<T>, Act> : gatedActKernel<T, 1, Act>;
  GatedActTensors const& t = a.tensors;
  return launch(kernel, a.plan.launch, a.stream, typed<T>(t.gate), typed<T>(t.up), typed<T>(t.y),
                a.count, act);
}

}  // namespace

cudaError_t gatedAct(Dtype dtype, GatedActSizes const& s, GatedActAttributes const& attributes,
                     GatedActTensors const& t, cudaStream_t stream) {
  if (!gatedActServes(s)) return cudaErrorInvalidValue;
  int64_t const count = s.B * s.T * s.I;
  if (count == 0) return cudaSuccess;
  GatedActPlan const plan = gatedActPlan(s, dtype, aligned({t.gate, t.up, t.y}));
  Arguments const a{plan, count, t, stream};
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (attributes.activation) {
      case Activation::kSilu:
        return start<T>(a, Silu<T>{});
      case Activation::kGeluTanh:
        return start<T>(a, GeluTanh<T>{});
      case Activation::kGeluErf:
        return start<T>(a, GeluErf<T>{});
      case Activation::kSwigluClamped:
        return start<T>(a, SwigluClamped<T>{attributes.alpha, attributes.limit});
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace llmexport
