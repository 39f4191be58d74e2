#include "common/refuse.h"
#include "wkv/wkv.cuh"

namespace llmexport {

bool wkvServes(WkvSizes const& s) {
  return isAtMost("Wkv", "B", {s.B}, kMaxGridY) &&
         isAtMost("Wkv", "C", {s.C}, kMaxGridX * kWkvThreads);
}

LaunchPlan wkvPlan(WkvSizes const& s) {
  return {dim3(unsigned(ceilDiv(s.C, kWkvThreads)), unsigned(s.B)), dim3(kWkvThreads)};
}

cudaError_t wkv(Dtype dtype, WkvSizes const& s, WkvTensors const& t, cudaStream_t stream) {
  if (!wkvServes(s)) return cudaErrorInvalidValue;
  if (s.B * s.C == 0) return cudaSuccess;
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    WkvArguments<T> const a{typed<T>(t.key),
                            typed<T>(t.value),
                            typed<T>(t.present),
                            t.timeDecay,
                            t.timeFirst,
                            t.states,
                            typed<T>(t.y),
                            t.next,
                            s.T,
                            s.C};
    return launch(wkvKernel<T>, wkvPlan(s), stream, a);
  });
}

}  // namespace llmexport
