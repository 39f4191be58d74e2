#include "moe_route/moe_route.h"
#include "trt/op.h"

namespace llmexport {
namespace {

MoeRouteAttributes read(Values const& values) {
  return {values[0].integer,      Scoring(values[1].integer), values[2].integer != 0,
          values[3].real,         values[4].integer,          values[5].integer};
}

int32_t check(Sizes const& sizes, Values const& values) {
  auto const a = read(values);
  long long const E = sizes['E'];
  if (a.groups < 1 || a.groupsKept < 1 || a.groupsKept > a.groups) {
    return refuse("MoeRoute: %d of %d groups are kept", a.groupsKept, a.groups);
  }
  if (E == Sizes::kUnknown) return 0;
  if (a.topK > E) return refuse("MoeRoute: top_k is %d, but there are E = %lld experts", a.topK, E);
  if (a.groups > 1 && (E % a.groups != 0 || E / a.groups < 2)) {
    return refuse("MoeRoute: E = %lld experts are not %d groups of two or more", E, a.groups);
  }
  return 0;
}

int32_t supports(Node const& node) {
  auto const a = read(node.attributes);
  long long const E = node.sizes['E'];
  if (E > kRouteMaxExperts) {
    return refuse("MoeRoute: E = %lld experts, the kernel holds %lld", E,
                  (long long)kRouteMaxExperts);
  }
  if (a.groups > kRouteMaxGroups) {
    return refuse("MoeRoute: %d groups, the kernel has a lane for %lld", a.groups,
                  (long long)kRouteMaxGroups);
  }
  return checkProduct("MoeRoute", node.sizes, "BT", kMaxGridX);
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  return moeRoute(call.dtype, s['B'] * s['T'], s['E'], read(call.attributes), call.inputs[0],
                  call.inputs[1], call.outputs[0], static_cast<int32_t*>(call.outputs[1]),
                  call.stream);
}

Registration const registration({
    "MoeRoute",
    {{"logits", "BTE"}, {"bias", "E", Element::kT, kOptional}},
    {{"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
    // The choices in the order of enum class Scoring.
    {{"top_k", Kind::kInt, {}, 'K'},
     {"scoring", Kind::kChoice, {"softmax", "softmax_top_k", "sigmoid"}},
     {"renormalise", Kind::kBool},
     {"scale", Kind::kFloat},
     {"groups", Kind::kInt},
     {"groups_kept", Kind::kInt}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
