#include <algorithm>

#include "common/refuse.h"
#include "rope/rope.cuh"

namespace llmexport {

bool ropeFits(RopeSizes const& s) {
  if (s.D == kUnknown || s.R == kUnknown || 2 * s.R <= s.D) return true;
  return refuse("Rope: cos has R = %lld angles, but x has D = %lld dimensions, fewer than 2 * R",
                (long long)s.R, (long long)s.D);
}

bool ropeServes(RopeSizes const& s) {
  return ropeFits(s) && isAtMost("Rope", "BT", {s.B, s.T}, INT32_MAX) &&
         isAtMost("Rope", "H", {s.H}, kMaxGridY * kRopeHeads) &&
         isAtMost("Rope", "D", {s.D}, INT32_MAX);
}

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
cudaError_t start(RopePlan const& plan, RopeSizes const& s, RopeTensors const& t,
                  cudaStream_t stream) {
  return launch(ropeKernel<T, kWidth, kInterleaved>, plan.launch, stream, typed<T>(t.x),
                typed<T>(t.cos), typed<T>(t.sin), typed<T>(t.y), s.B * s.T, int(s.T), int(s.H),
                int(s.D), int(s.R));
}

}  // namespace

cudaError_t rope(Dtype dtype, RopeSizes const& s, RopeAttributes const& attributes,
                 RopeTensors const& t, cudaStream_t stream) {
  if (!ropeServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.H * s.T * s.D == 0) return cudaSuccess;
  RopePlan const plan = ropePlan(s, dtype, aligned({t.x, t.cos, t.sin, t.y}));
  bool const interleaved = attributes.interleaved;
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto const function =
        plan.width > 1
            ? (interleaved ? start<T, kFullWidth<T>, true> : start<T, kFullWidth<T>, false>)
            : (interleaved ? start<T, 1, true> : start<T, 1, false>);
    return function(plan, s, t, stream);
  });
}

}  // namespace llmexport
