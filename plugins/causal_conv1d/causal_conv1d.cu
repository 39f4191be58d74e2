#include "causal_conv1d/causal_conv1d.cuh"

#include <algorithm>

namespace llmexport {
namespace {

// Enough to cover the latency of memory with what each has under way.
constexpr int64_t kThreadsPerProcessor = 1024;
// Of a chunk. Fewer read the kTaps - 1 inputs before them for too little; more help no further.
constexpr int64_t kFewestTokens = 8, kMostTokens = 64;

template <class T, int kWidth>
auto kernelFor(int64_t taps) {
  return taps == 2   ? causalConv1dKernel<T, kWidth, 2>
         : taps == 3 ? causalConv1dKernel<T, kWidth, 3>
                     : causalConv1dKernel<T, kWidth, 4>;
}

}  // namespace

CausalConv1dPlan causalConv1dPlan(CausalConv1dSizes const& s, Dtype dtype, bool pointersAligned,
                                  Device const& device) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  int const width = pointersAligned && s.C % full == 0 ? full : 1;
  int64_t const vectors = s.C / width;
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  unsigned const chunksPerBlock = kConvThreads / lanes;
  // As long as may be with every SM busy.
  int64_t const wanted = s.B * s.T * vectors / (device.processors * kThreadsPerProcessor);
  int64_t const length =
      std::clamp(ceilDiv(wanted, kConvUnrolled) * kConvUnrolled, kFewestTokens, kMostTokens);
  // Without tokens the state still goes through.
  int64_t const chunks = std::max<int64_t>(1, ceilDiv(s.T, length));
  return {{dim3(unsigned(ceilDiv(s.B * chunks, chunksPerBlock)), unsigned(ceilDiv(vectors, lanes))),
           dim3(lanes, chunksPerBlock)},
          width,
          length,
          chunks};
}

cudaError_t causalConv1d(Dtype dtype, CausalConv1dSizes const& s, bool silu,
                         CausalConv1dTensors const& t, Device const& device, cudaStream_t stream) {
  if (s.K < kConvFewestTaps || s.K > kConvMostTaps) return cudaErrorInvalidValue;
  if (s.B * s.C == 0) return cudaSuccess;
  auto const plan = causalConv1dPlan(
      s, dtype, aligned({t.x, t.weight, t.state, t.bias, t.y, t.nextState}), device);
  if (s.B * plan.chunks > kMaxGridX || s.C > kConvMostChannels) return cudaErrorInvalidValue;
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    CausalConv1dArguments<T> const a{static_cast<T const*>(t.x),
                                     static_cast<T const*>(t.weight),
                                     static_cast<T const*>(t.state),
                                     static_cast<T const*>(t.bias),
                                     static_cast<T*>(t.y),
                                     static_cast<T*>(t.nextState),
                                     s.B,
                                     s.T,
                                     s.C,
                                     plan.chunks,
                                     plan.length,
                                     silu};
    auto const kernel = plan.width > 1 ? kernelFor<T, kFullWidth<T>>(s.K) : kernelFor<T, 1>(s.K);
    return launch(kernel, plan.launch, stream, a);
  });
}

}  // namespace llmexport
