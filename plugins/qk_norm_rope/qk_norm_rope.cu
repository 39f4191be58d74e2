#include <algorithm>

#include "common/refuse.h"
#include "qk_norm_rope/launcher.cuh"

namespace llmexport {
namespace {

// Heads of q, k and v together: kUnknown if one number is, INT64_MAX if it is over that.
int64_t headsOf(QkNormRopeSizes const& s) {
  if (s.H == kUnknown || s.G == kUnknown) return kUnknown;
  int64_t heads = 0;
  bool const over = __builtin_mul_overflow(s.G, int64_t{2}, &heads) ||
                    __builtin_add_overflow(heads, s.H, &heads);
  return over ? INT64_MAX : heads;
}

}  // namespace

bool qkNormRopeFits(QkNormRopeSizes const& s, char const* op) {
  if (s.Q != kUnknown && s.D != kUnknown && s.Q < s.D) {
    return refuse("%s: q has Q = %lld numbers a head, fewer than the D = %lld of k", op,
                  (long long)s.Q, (long long)s.D);
  }
  if (s.D == kUnknown || s.R == kUnknown || 2 * s.R <= s.D) return true;
  return refuse("%s: cos has R = %lld angles, but k has D = %lld dimensions, fewer than 2 * R", op,
                (long long)s.R, (long long)s.D);
}

bool qkNormRopeServes(QkNormRopeSizes const& s, char const* op) {
  return qkNormRopeFits(s, op) && isAtMost(op, "BT", {s.B, s.T}, kMaxGridX) &&
         isAtMost(op, "Q", {s.Q}, INT32_MAX) && isAtMost(op, "D", {s.D}, INT32_MAX) &&
         (headsOf(s) <= kMaxGridY || refuse("%s: q, k and v have %lld heads, the kernels take %lld",
                                            op, (long long)headsOf(s), (long long)kMaxGridY));
}

QkNormRopePlan qkNormRopePlan(QkNormRopeSizes const& sizes, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  bool const vectors = pointersAligned && sizes.D % full == 0 && sizes.R % full == 0 &&
                       sizes.Q % full == 0 && sizes.pitch % full == 0;
  int const width = vectors ? full : 1;
  int64_t const heads = headsOf(sizes), units = (sizes.D - sizes.R) / width;
  unsigned lanes = 1;
  while (lanes < kWarp && lanes < units) lanes *= 2;
  // Whole warps, as lanes of a head shuffle.
  unsigned const perWarp = kWarp / lanes;
  unsigned const rows = unsigned(std::min<int64_t>(ceilDiv(heads, perWarp) * perWarp,
                                                   kQkNormRopeThreads / lanes));
  return {{dim3(unsigned(sizes.B * sizes.T), unsigned(ceilDiv(heads, rows))), dim3(lanes, rows)},
          width,
          units <= lanes};
}

cudaError_t qkNormRope(Dtype dtype, QkNormRopeSizes const& s,
                       QkNormRopeAttributes const& attributes, QkNormRopeTensors const& t,
                       cudaStream_t stream) {
  if (!qkNormRopeServes(s)) return cudaErrorInvalidValue;
  return launchQkNormRope(dtype, s, attributes, t, StepRows{}, stream);
}

}  // namespace llmexport
