#include <algorithm>

#include "common/refuse.h"
#include "qk_norm_rope/qk_norm_rope.cuh"

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

template <class T, int kWidth, bool kInterleaved, bool kOnce>
cudaError_t start(QkNormRopePlan const& plan, QkNormRopeSizes const& s,
                  QkNormRopeAttributes const& attributes, QkNormRopeTensors const& t,
                  cudaStream_t stream) {
  auto const heads = [](void const* x, void const* weight, void* y, int64_t count) {
    return Heads<T>{typed<T>(x), typed<T>(weight), typed<T>(y), int(count)};
  };
  return launch(qkNormRopeKernel<T, kWidth, kInterleaved, kOnce>, plan.launch, stream,
                heads(t.q, t.qWeight, t.query, s.H), heads(t.k, t.kWeight, t.key, s.G),
                heads(t.v, nullptr, t.value, s.G), typed<T>(t.cos), typed<T>(t.sin), int(s.T),
                int(s.D), int(s.Q), int(s.R), attributes);
}

}  // namespace

bool qkNormRopeFits(QkNormRopeSizes const& s) {
  if (s.Q != kUnknown && s.D != kUnknown && s.Q < s.D) {
    return refuse("QkNormRope: q has Q = %lld numbers a head, fewer than the D = %lld of k",
                  (long long)s.Q, (long long)s.D);
  }
  if (s.D == kUnknown || s.R == kUnknown || 2 * s.R <= s.D) return true;
  return refuse(
      "QkNormRope: cos has R = %lld angles, but k has D = %lld dimensions, fewer than 2 * R",
      (long long)s.R, (long long)s.D);
}

bool qkNormRopeServes(QkNormRopeSizes const& s) {
  return qkNormRopeFits(s) && isAtMost("QkNormRope", "BT", {s.B, s.T}, kMaxGridX) &&
         isAtMost("QkNormRope", "Q", {s.Q}, INT32_MAX) &&
         isAtMost("QkNormRope", "D", {s.D}, INT32_MAX) &&
         (headsOf(s) <= kMaxGridY ||
          refuse("QkNormRope: q, k and v have %lld heads, the kernels take %lld",
                 (long long)headsOf(s), (long long)kMaxGridY));
}

QkNormRopePlan qkNormRopePlan(QkNormRopeSizes const& sizes, Dtype dtype, bool pointersAligned) {
  int const full = kVectorBytes / int(sizeOf(dtype));
  bool const vectors = pointersAligned && sizes.D % full == 0 && sizes.R % full == 0 &&
                       sizes.Q % full == 0;
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
  if (s.B * s.T * s.D * headsOf(s) == 0) return cudaSuccess;
  bool const alignedAll =
      aligned({t.q, t.k, t.v, t.cos, t.sin, t.qWeight, t.kWeight, t.query, t.key, t.value});
  QkNormRopePlan const plan = qkNormRopePlan(s, dtype, alignedAll);
  return withType(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    auto const choose = [&](auto turned) {
      constexpr bool kInterleaved = decltype(turned)::value;
      if (plan.width == 1) return start<T, 1, kInterleaved, false>;
      return plan.once ? start<T, kFullWidth<T>, kInterleaved, true>
                       : start<T, kFullWidth<T>, kInterleaved, false>;
    };
    auto const function =
        attributes.interleaved ? choose(std::true_type{}) : choose(std::false_type{});
    return function(plan, s, attributes, t, stream);
  });
}

}  // namespace llmexport
