#include "moe_route/moe_route.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Outputs { kWeights, kExperts };
enum Attributes { kTopK, kScoring, kRenormalise, kScale, kGroups, kGroupsKept, kGroupBest, kSlots };

// MoeRoute's own plugin, and those of plugins/shared_route.py.
enum class Shared { kNone, kAlone, kGated };

template <Shared kShared>
struct Inputs {
  static constexpr int kLogits = 0, kGate = 1, kBias = kShared == Shared::kGated ? 2 : 1;
};

MoeRouteSizes sizesOf(Sizes const& s, int64_t pitch) { return {s['B'], s['T'], s['E'], pitch}; }

template <Shared kShared>
MoeRouteAttributes attributesOf(Values const& values) {
  int32_t const topK = values[kTopK].integer;
  return {topK,
          Scoring(values[kScoring].integer),
          values[kRenormalise].integer != 0,
          values[kScale].real,
          values[kGroups].integer,
          values[kGroupsKept].integer,
          values[kGroupBest].integer,
          kShared == Shared::kNone ? 0 : values[kSlots].integer - topK};
}

template <Shared kShared>
bool check(Sizes const& sizes, Values const& values) {
  auto const attributes = attributesOf<kShared>(values);
  if (kShared != Shared::kNone && attributes.always < 1) {
    return refuse("SharedMoeRoute: slots is %d, which leaves none behind top_k = %d",
                  attributes.slots(), attributes.topK);
  }
  if (kShared == Shared::kGated && sizes['L'] != kUnknown && sizes['L'] != 1) {
    return refuse("GatedSharedMoeRoute: shared_gate has L = %lld columns, not one",
                  (long long)sizes['L']);
  }
  return moeRouteFits(sizesOf(sizes, kUnknown), attributes);
}

template <Shared kShared>
bool supports(Node const& node) {
  return moeRouteServes(sizesOf(node.sizes, node.pitch), attributesOf<kShared>(node.attributes));
}

template <Shared kShared>
cudaError_t enqueue(Call const& call) {
  using In = Inputs<kShared>;
  MoeRouteTensors const tensors{call.input(In::kLogits), call.input(In::kBias),
                                call.output(kWeights), call.output<int32_t>(kExperts),
                                kShared == Shared::kGated ? call.input(In::kGate) : nullptr};
  return moeRoute(call.dtype, sizesOf(call.sizes, call.pitch),
                  attributesOf<kShared>(call.attributes), tensors, call.stream);
}

template <Shared kShared>
Op route(char const* name) {
  std::vector<Tensor> inputs{joins({"logits", "BTE"})};
  if (kShared == Shared::kGated) inputs.push_back(joins({"shared_gate", "BTL"}));
  inputs.push_back({"bias", "E", Element::kT, kOptional});
  // The choices in the order of enum class Scoring.
  std::vector<Attribute> attributes{
      {"top_k", Kind::kInt, {}, kShared == Shared::kNone ? 'K' : '\0'},
      {"scoring", Kind::kChoice, {"softmax", "softmax_top_k", "sigmoid"}},
      {"renormalise", Kind::kBool},
      {"scale", Kind::kFloat},
      {"groups", Kind::kInt},
      {"groups_kept", Kind::kInt},
      {"group_best", Kind::kInt}};
  if (kShared != Shared::kNone) attributes.push_back({"slots", Kind::kInt, {}, 'K'});
  return {name,
          "1",
          inputs,
          {{"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
          attributes,
          enqueue<kShared>,
          check<kShared>,
          supports<kShared>};
}

Registration const alone(route<Shared::kNone>("MoeRoute"));
Registration const shared(route<Shared::kAlone>("SharedMoeRoute"));
Registration const gated(route<Shared::kGated>("GatedSharedMoeRoute"));

}  // namespace
}  // namespace llmexport
