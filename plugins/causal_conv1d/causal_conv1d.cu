#include <algorithm>

#include "causal_conv1d/causal_conv1d.cuh"
#include "common/refuse.h"

namespace llmexport {
namespace {

// Threads of an SM whose loads under way cover the latency of memory.
constexpr int64_t kThreadsPerProcessor = 1024;
// Tokens of a chunk. A shorter one reads the kTaps - 1 inputs before it for too little; a longer
// one is no faster.
constexpr int64_t kFewestTokens = 8, kMostTokens = 64;

template <class T, int kWidth>
auto kernelFor(int64_t taps) {
  return taps == 2   ? causalConv1dKernel<T, kWidth, 2>
         : taps == 3 ? causalConv1dKernel<T, kWidth, 3>
                     : causalConv1dKernel<T, kWidth, 4>;
}

}  // namespace

bool causalConv1dFits(char const* op, int64_t O, int64_t K, int64_t S) {
  if (O != kUnknown && O != 1) {
    return refuse("%s: weight has %lld inputs for each channel, not 1", op, (long long)O);
  }
  if (K == kUnknown || S == kUnknown || S == K - 1) return true;
  return refuse("%s: state has S = %lld inputs, but weight K = %lld taps, not S + 1", op,
                (long long)S, (long long)K);
}

bool causalConv1dServes(char const* op, CausalConv1dSizes const& s) {
  if (s.K != kUnknown && (s.K < kFewestTaps || s.K > kMostTaps)) {
    return refuse("%s: weight has K = %lld taps, the kernels are for %d to %d", op, (long long)s.K,
                  kFewestTaps, kMostTaps);
  }
  // A block takes a warp of channels or more.
  return isAtMost(op, "C", {s.C}, kMaxGridY * kWarp) && isAtMost(op, "BT", {s.B, s.T}, kMaxGridX) &&
         isAtMost(op, "B", {s.B}, kMaxGridX);
}

CausalConv1dPlan causalConv1dPlan(CausalConv1dSizes const& s, Dtype dtype, bool pointersAligned,
                                  Device const& device) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  bool const whole = pointersAligned && s.C % full == 0 && s.pitch % full == 0;
  int const width = whole ? full : 1;
  int64_t const vectors = s.C / width;
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  unsigned const chunksPerBlock = kConvThreads / lanes;
  // Chunks are as long as may be with every SM busy.
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

cudaError_t causalConv1d(Dtype dtype, CausalConv1dSizes const& s,
                         CausalConv1dAttributes const& attributes, CausalConv1dTensors const& t,
                         Device const& device, cudaStream_t stream) {
  if (!causalConv1dServes("CausalConv1d", s)) return cudaErrorInvalidValue;
  if (s.B * s.C == 0) return cudaSuccess;
  auto const plan = causalConv1dPlan(
      s, dtype, aligned({t.x, t.weight, t.state, t.bias, t.y, t.nextState}), device);
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    CausalConv1dArguments<T> const a{typed<T>(t.x),
                                     typed<T>(t.weight),
                                     typed<T>(t.state),
                                     typed<T>(t.bias),
                                     t.end,
                                     typed<T>(t.y),
                                     typed<T>(t.nextState),
                                     s.B,
                                     s.T,
                                     s.C,
                                     s.pitch ? s.pitch : s.C,
                                     plan.chunks,
                                     plan.length,
                                     attributes.silu};
    auto const kernel = plan.width > 1 ? kernelFor<T, kFullWidth<T>>(s.K) : kernelFor<T, 1>(s.K);
    return launch(kernel, plan.launch, stream, a);
  });
}

}  // namespace llmexport
