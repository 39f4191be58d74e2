#include "common/refuse.h"
#include "wkv7/wkv7.cuh"

namespace llmexport {
namespace {

template <class T, int D>
cudaError_t start(Wkv7Sizes const& s, Wkv7Arguments<T> const& a, cudaStream_t stream) {
  return launch(wkv7Kernel<T, D>, wkv7Plan(s), stream, a);
}

}  // namespace

bool wkv7Serves(Wkv7Sizes const& s) {
  bool const served = s.D == 16 || s.D == 32 || s.D == 64 || s.D == 128;
  if (s.D != kUnknown && !served) {
    return refuse("Wkv7: D is %lld, but there are kernels for 16, 32, 64 and 128 only",
                  (long long)s.D);
  }
  return isAtMost("Wkv7", "B", {s.B}, kMaxGridY) && isAtMost("Wkv7", "H", {s.H}, kMaxGridY) &&
         isAtMost("Wkv7", "V", {s.V}, INT32_MAX);
}

LaunchPlan wkv7Plan(Wkv7Sizes const& s) {
  return {dim3(unsigned(ceilDiv(s.V, kWkv7Rows)), unsigned(s.H), unsigned(s.B)),
          dim3(kWkv7Threads)};
}

cudaError_t wkv7(Dtype dtype, Wkv7Sizes const& s, Wkv7Tensors const& t, cudaStream_t stream) {
  if (!wkv7Serves(s)) return cudaErrorInvalidValue;
  if (s.B * s.H * s.V == 0) return cudaSuccess;
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    Wkv7Arguments<T> const a{typed<T>(t.r),
                             typed<T>(t.w),
                             typed<T>(t.k),
                             typed<T>(t.v),
                             typed<T>(t.kappa),
                             typed<T>(t.a),
                             typed<T>(t.present),
                             t.state,
                             typed<T>(t.y),
                             t.nextState,
                             s.T,
                             int(s.V),
                             aligned({t.state, t.nextState})};
    switch (s.D) {
      case 16:
        return start<T, 16>(s, a, stream);
      case 32:
        return start<T, 32>(s, a, stream);
      case 64:
        return start<T, 64>(s, a, stream);
      default:
        return start<T, 128>(s, a, stream);
    }
  });
}

}  // namespace llmexport
