// The launch of qkNormRopeKernel, which QkNormRope and QkNormRopeWrite share.
#pragma once

#include "qk_norm_rope/qk_norm_rope.cuh"

namespace llmexport {

template <class T, int kWidth, bool kInterleaved, bool kOnce, class Rows>
cudaError_t startQkNormRope(QkNormRopePlan const& plan, QkNormRopeSizes const& s,
                            QkNormRopeAttributes const& attributes, QkNormRopeTensors const& t,
                            Rows const& rows, cudaStream_t stream) {
  auto const heads = [&](void const* x, void const* bias, void const* weight, void* y,
                         int64_t count, int64_t apart) {
    int64_t const pitch = s.pitch ? s.pitch : count * apart;
    return Heads<T>{typed<T>(x), typed<T>(weight), typed<T>(bias), typed<T>(y),
                    int(count),  unsigned(apart),  pitch};
  };
  return launch(qkNormRopeKernel<T, kWidth, kInterleaved, kOnce, Rows>, plan.launch, stream,
                heads(t.q, t.qBias, t.qWeight, t.query, s.H, s.Q),
                heads(t.k, t.kBias, t.kWeight, t.key, s.G, s.D),
                heads(t.v, t.vBias, nullptr, t.value, s.G, s.D), typed<T>(t.cos), typed<T>(t.sin),
                int(s.T), int(s.D), int(s.R), attributes, rows);
}

// `rows` is as the kernel's. There is nothing to do where a size is 0.
template <class Rows>
cudaError_t launchQkNormRope(Dtype dtype, QkNormRopeSizes const& s,
                             QkNormRopeAttributes const& attributes, QkNormRopeTensors const& t,
                             Rows const& rows, cudaStream_t stream) {
  if (product({s.B, s.T, s.D, s.H + 2 * s.G}) == 0) return cudaSuccess;
  bool const alignedAll = aligned({t.q, t.k, t.v, t.cos, t.sin, t.qWeight, t.kWeight, t.qBias,
                                   t.kBias, t.vBias, t.query, t.key, t.value});
  QkNormRopePlan const plan = qkNormRopePlan(s, dtype, alignedAll);
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto const choose = [&](auto turned) {
      constexpr bool kInterleaved = decltype(turned)::value;
      if (plan.width == 1) return startQkNormRope<T, 1, kInterleaved, false, Rows>;
      return plan.once ? startQkNormRope<T, kFullWidth<T>, kInterleaved, true, Rows>
                       : startQkNormRope<T, kFullWidth<T>, kInterleaved, false, Rows>;
    };
    auto const function =
        attributes.interleaved ? choose(std::true_type{}) : choose(std::false_type{});
    return function(plan, s, attributes, t, rows, stream);
  });
}

}  // namespace llmexport
