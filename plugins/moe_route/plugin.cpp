#include "moe_route/moe_route.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kLogits, kBias };
enum Outputs { kWeights, kExperts };
enum Attributes { kTopK, kScoring, kRenormalise, kScale, kGroups, kGroupsKept, kGroupBest };

MoeRouteSizes sizesOf(Sizes const& s, int64_t pitch) { return {s['B'], s['T'], s['E'], pitch}; }

MoeRouteAttributes attributesOf(Values const& values) {
  return {values[kTopK].integer,
          Scoring(values[kScoring].integer),
          values[kRenormalise].integer != 0,
          values[kScale].real,
          values[kGroups].integer,
          values[kGroupsKept].integer,
          values[kGroupBest].integer};
}

bool check(Sizes const& sizes, Values const& values) {
  return moeRouteFits(sizesOf(sizes, kUnknown), attributesOf(values));
}

bool supports(Node const& node) {
  return moeRouteServes(sizesOf(node.sizes, node.pitch), attributesOf(node.attributes));
}

cudaError_t enqueue(Call const& call) {
  MoeRouteTensors const tensors{call.input(kLogits), call.input(kBias), call.output(kWeights),
                                call.output<int32_t>(kExperts)};
  return moeRoute(call.dtype, sizesOf(call.sizes, call.pitch), attributesOf(call.attributes),
                  tensors, call.stream);
}

Registration const registration({
    "MoeRoute",
    "1",
    {joins({"logits", "BTE"}), {"bias", "E", Element::kT, kOptional}},
    {{"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
    // The choices in the order of enum class Scoring.
    {{"top_k", Kind::kInt, {}, 'K'},
     {"scoring", Kind::kChoice, {"softmax", "softmax_top_k", "sigmoid"}},
     {"renormalise", Kind::kBool},
     {"scale", Kind::kFloat},
     {"groups", Kind::kInt},
     {"groups_kept", Kind::kInt},
     {"group_best", Kind::kInt}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
