#include "normed_moe_route/normed_moe_route.h"
#include "trt/op.h"

namespace llmexport {
namespace {

// Those of plugins/normed_route.py.
enum class Shared { kNone, kAlone, kGated };

enum CommonInputs { kX, kResidual, kNormWeight, kRouterWeight, kRouterBias, kGateWeight };
enum Outputs { kY, kSum, kWeights, kExperts };
enum Attributes { kTopK, kScoring, kRenormalise, kScale, kGroups, kGroupsKept, kGroupBest, kSlots };

template <Shared kShared>
struct Places {
  static constexpr int kBias = kGateWeight + (kShared == Shared::kGated);
  static constexpr int kEpsilon = kSlots + (kShared != Shared::kNone);
  static constexpr int kWeightOffset = kEpsilon + 1, kRoundBeforeWeight = kEpsilon + 2;
  static constexpr int kWide = kEpsilon + 3;
};

NormedMoeRouteSizes sizesOf(Sizes const& s) { return {product({s['B'], s['T']}), s['C'], s['E']}; }

template <Shared kShared>
NormedMoeRouteAttributes attributesOf(Values const& values) {
  using At = Places<kShared>;
  int32_t const topK = values[kTopK].integer;
  return {{topK,
           Scoring(values[kScoring].integer),
           values[kRenormalise].integer != 0,
           values[kScale].real,
           values[kGroups].integer,
           values[kGroupsKept].integer,
           values[kGroupBest].integer,
           kShared == Shared::kNone ? 0 : values[kSlots].integer - topK},
          {values[At::kEpsilon].real, values[At::kWeightOffset].real,
           values[At::kRoundBeforeWeight].integer != 0},
          values[At::kWide].integer != 0};
}

template <Shared kShared>
bool check(Sizes const& sizes, Values const& values) {
  auto const attributes = attributesOf<kShared>(values);
  if (kShared != Shared::kNone && attributes.route.always < 1) {
    return refuse("NormedSharedMoeRoute: slots is %d, which leaves none behind top_k = %d",
                  attributes.route.slots(), attributes.route.topK);
  }
  if (kShared == Shared::kGated && sizes['L'] != kUnknown && sizes['L'] != 1) {
    return refuse("NormedGatedSharedMoeRoute: gate_weight has L = %lld rows, not one",
                  (long long)sizes['L']);
  }
  return moeRouteFits({1, kUnknown, sizes['E']}, attributes.route);
}

template <Shared kShared>
bool supports(Node const& node) {
  return normedMoeRouteServes(sizesOf(node.sizes), attributesOf<kShared>(node.attributes));
}

template <Shared kShared>
size_t workspace(Node const& node) {
  return normedMoeRouteWorkspace(sizesOf(node.sizes), kShared == Shared::kGated);
}

template <Shared kShared>
cudaError_t enqueue(Call const& call) {
  NormedMoeRouteTensors const tensors{
      call.input(kX),
      call.input(kResidual),
      call.input(kNormWeight),
      call.input(kRouterWeight),
      call.input(kRouterBias),
      kShared == Shared::kGated ? call.input(kGateWeight) : nullptr,
      call.input<float>(Places<kShared>::kBias),
      call.output(kY),
      call.output(kSum),
      call.output(kWeights),
      call.output<int32_t>(kExperts)};
  return normedMoeRoute(call.dtype, sizesOf(call.sizes), attributesOf<kShared>(call.attributes),
                        tensors, call.workspace, call.device, call.stream);
}

template <Shared kShared>
Op route(char const* name) {
  std::vector<Tensor> inputs{{"x", "BTC"},
                             {"residual", "BTC"},
                             {"norm_weight", "C"},
                             {"router_weight", "EC"},
                             {"router_bias", "E"}};
  if (kShared == Shared::kGated) inputs.push_back({"gate_weight", "LC"});
  inputs.push_back({"bias", "E", Element::kFloat32, kOptional});
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
  attributes.push_back({"epsilon", Kind::kFloat});
  attributes.push_back({"weight_offset", Kind::kFloat});
  attributes.push_back({"round_before_weight", Kind::kBool});
  attributes.push_back({"wide", Kind::kBool});
  return {name,
          "1",
          inputs,
          {{"y", "BTC"}, {"sum", "BTC"}, {"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
          attributes,
          enqueue<kShared>,
          check<kShared>,
          supports<kShared>,
          workspace<kShared>};
}

Registration const alone(route<Shared::kNone>("NormedMoeRoute"));
Registration const shared(route<Shared::kAlone>("NormedSharedMoeRoute"));
Registration const gated(route<Shared::kGated>("NormedGatedSharedMoeRoute"));

}  // namespace
}  // namespace llmexport
