#include <algorithm>

#include "rope/rope.cuh"

namespace llmexport {

RopePlan ropePlan(RopeSizes const& sizes, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  bool const vectors = pointersAligned && sizes.D % full == 0 && sizes.R % full == 0;
  int const width = vectors ? full : 1;
  int64_t const tokens = sizes.B * sizes.T;
  int64_t const units = (sizes.D - sizes.R) / width;
  unsigned const lanes = unsigned(std::clamp<int64_t>(units, 1, kRopeThreads));
  unsigned const rows = unsigned(std::clamp<int64_t>(tokens, 1, kRopeThreads / lanes));
  return {{dim3(unsigned(ceilDiv(tokens, rows)), unsigned(ceilDiv(sizes.H, kRopeHeads))),
           dim3(lanes, rows)},
          width};
}

namespace {

template <class T, int kWidth, bool kInterleaved>
cudaError_t start(RopePlan const& plan, RopeSizes const& s, void const* x, void const* cos,
                  void const* sin, void* y, cudaStream_t stream) {
  return launch(ropeKernel<T, kWidth, kInterleaved>, plan.launch, stream, static_cast<T const*>(x),
                static_cast<T const*>(cos), static_cast<T const*>(sin), static_cast<T*>(y),
                s.B * s.T, int(s.T), int(s.H), int(s.D), int(s.R));
}

}  // namespace

cudaError_t rope(Dtype dtype, RopeSizes const& s, bool interleaved, void const* x, void const* cos,
                 void const* sin, void* y, cudaStream_t stream) {
  if (s.B * s.H * s.T * s.D == 0) return cudaSuccess;
  if (std::max({s.B * s.T, s.D, s.H}) > INT32_MAX) return cudaErrorInvalidValue;
  RopePlan const plan = ropePlan(s, dtype, aligned({x, cos, sin, y}));
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto const function =
        plan.width > 1
            ? (interleaved ? start<T, kFullWidth<T>, true> : start<T, kFullWidth<T>, false>)
            : (interleaved ? start<T, 1, true> : start<T, 1, false>);
    return function(plan, s, x, cos, sin, y, stream);
  });
}

}  // namespace llmexport
