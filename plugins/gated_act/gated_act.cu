#include "common/refuse.h"
#include "gated_act/gated_act.cuh"

namespace llmexport {

bool gatedActServes(GatedActSizes const& s) {
  // Of a block, where an access has one element.
  constexpr int64_t kMost = kGatedActThreads * kGatedActVectors;
  if (!s.halves && !s.pitch) {
    return isAtMost("GatedAct", "BTI", {s.B, s.T, s.I}, kMaxGridX * kMost);
  }
  return isAtMost("GatedAct", "BT", {s.B, s.T}, kMaxGridX) &&
         isAtMost("GatedAct", "I", {s.I}, kMaxGridY * kMost);
}

GatedActPlan gatedActPlan(GatedActSizes const& s, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  if (s.halves || s.pitch) {
    bool const whole = pointersAligned && s.I % full == 0 && s.pitch % full == 0;
    int const width = whole ? full : 1;
    int64_t const vectors = s.I / width;
    // Parts of one length, up to whole warps.
    int64_t const parts = ceilDiv(vectors, kGatedActThreads * kGatedActVectors);
    int64_t const threads = ceilDiv(ceilDiv(vectors, parts * kGatedActVectors), kWarp) * kWarp;
    return {{dim3(unsigned(s.B * s.T), unsigned(parts)), dim3(unsigned(threads))}, width};
  }
  int const width = pointersAligned ? full : 1;
  int64_t const blocks = ceilDiv(s.B * s.T * s.I, kGatedActThreads * kGatedActVectors * width);
  return {{dim3(unsigned(blocks)), dim3(kGatedActThreads)}, width};
}

namespace {

struct Arguments {
  GatedActPlan const& plan;
  GatedActSizes const& sizes;
  GatedActTensors const& tensors;
  cudaStream_t stream;
};

template <class T, class Act>
cudaError_t start(Arguments const& a, Act act) {
  bool const wide = a.plan.width > 1;
  GatedActSizes const& s = a.sizes;
  GatedActTensors const& t = a.tensors;
  if (s.halves || s.pitch) {
    auto const kernel =
        wide ? gatedActRowsKernel<T, kFullWidth<T>, Act> : gatedActRowsKernel<T, 1, Act>;
    auto const* const gate = typed<T>(t.gate);
    auto const* const up = s.halves ? gate + s.I : typed<T>(t.up);
    int64_t const pitch = s.pitch ? s.pitch : 2 * s.I;
    return launch(kernel, a.plan.launch, a.stream, gate, up, typed<T>(t.y), s.I, pitch, act);
  }
  auto const kernel = wide ? gatedActKernel<T, kFullWidth<T>, Act> : gatedActKernel<T, 1, Act>;
  return launch(kernel, a.plan.launch, a.stream, typed<T>(t.gate), typed<T>(t.up), typed<T>(t.y),
                s.B * s.T * s.I, act);
}

}  // namespace

cudaError_t gatedAct(Dtype dtype, GatedActSizes const& s, GatedActAttributes const& attributes,
                     GatedActTensors const& t, cudaStream_t stream) {
  if (!gatedActServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.T * s.I == 0) return cudaSuccess;
  GatedActPlan const plan = gatedActPlan(s, dtype, aligned({t.gate, t.up, t.y}));
  Arguments const a{plan, s, t, stream};
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
