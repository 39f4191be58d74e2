#include "common/refuse.h"
#include "qk_norm_rope/launcher.cuh"
#include "qk_norm_rope_write/qk_norm_rope_write.h"

namespace llmexport {

bool qkNormRopeWriteServes(QkNormRopeWriteSizes const& s) {
  constexpr char const* kOp = "QkNormRopeWrite";
  return qkNormRopeServes(s.step, kOp) && isAtMost(kOp, "S", {s.S}, INT32_MAX);
}

cudaError_t qkNormRopeWrite(Dtype dtype, QkNormRopeWriteSizes const& s,
                            QkNormRopeAttributes const& attributes, QkNormRopeWriteTensors const& t,
                            cudaStream_t stream) {
  if (!qkNormRopeWriteServes(s)) return cudaErrorInvalidValue;
  int64_t const bytes = s.step.B * s.step.G * s.S * s.step.D * int64_t(sizeOf(dtype));
  auto const begin = [&](void* cache, void const* past) {
    return cache == past || bytes == 0 ? cudaSuccess : copyBytes(cache, past, bytes, stream);
  };
  cudaError_t error = begin(t.step.key, t.pastKey);
  if (error == cudaSuccess) error = begin(t.step.value, t.pastValue);
  if (error != cudaSuccess) return error;
  CacheRows const rows{t.writeIndices, int(s.S)};
  return t.step.qBias
             ? launchQkNormRope(dtype, s.step, attributes, t.step, BiasedCacheRows{rows}, stream)
             : launchQkNormRope(dtype, s.step, attributes, t.step, rows, stream);
}

}  // namespace llmexport
