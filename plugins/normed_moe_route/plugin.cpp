#include "moe_route/node.h"
#include "normed_moe_route/normed_moe_route.h"

namespace llmexport {
namespace {

enum CommonInputs { kX, kResidual, kNormWeight, kRouterWeight, kRouterBias, kGateWeight };
enum Outputs { kY, kSum, kWeights, kExperts };

// Those of plugins/normed_route.py.
template <Shared kShared>
constexpr char const* kName = kShared == Shared::kNone    ? "NormedMoeRoute"
                              : kShared == Shared::kAlone ? "NormedSharedMoeRoute"
                                                          : "NormedGatedSharedMoeRoute";

template <Shared kShared>
struct Places {
  static constexpr int kBias = kGateWeight + (kShared == Shared::kGated);
  static constexpr int kEpsilon = kMoeRouteAttributes<kShared>;
  static constexpr int kWeightOffset = kEpsilon + 1, kRoundBeforeWeight = kEpsilon + 2;
  static constexpr int kWide = kEpsilon + 3;
};

NormedMoeRouteSizes sizesOf(Sizes const& s) { return {product({s['B'], s['T']}), s['C'], s['E']}; }

template <Shared kShared>
NormedMoeRouteAttributes attributesOf(Values const& values) {
  using At = Places<kShared>;
  return {moeRouteAttributesOf<kShared>(values),
          {values[At::kEpsilon].real, values[At::kWeightOffset].real,
           values[At::kRoundBeforeWeight].integer != 0},
          values[At::kWide].integer != 0};
}

template <Shared kShared>
bool check(Sizes const& sizes, Values const& values) {
  return moeRouteNodeFits<kShared>(kName<kShared>, "gate_weight", sizes,
                                   moeRouteAttributesOf<kShared>(values));
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
Op route() {
  std::vector<Tensor> inputs{{"x", "BTC"},
                             {"residual", "BTC"},
                             {"norm_weight", "C"},
                             {"router_weight", "EC"},
                             {"router_bias", "E"}};
  if (kShared == Shared::kGated) inputs.push_back({"gate_weight", "LC"});
  inputs.push_back({"bias", "E", Element::kFloat32, kOptional});
  std::vector<Attribute> attributes = moeRouteAttributes<kShared>();
  attributes.push_back({"epsilon", Kind::kFloat});
  attributes.push_back({"weight_offset", Kind::kFloat});
  attributes.push_back({"round_before_weight", Kind::kBool});
  attributes.push_back({"wide", Kind::kBool});
  return {kName<kShared>,
          "1",
          inputs,
          {{"y", "BTC"}, {"sum", "BTC"}, {"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
          attributes,
          enqueue<kShared>,
          check<kShared>,
          supports<kShared>,
          workspace<kShared>};
}

Registration const alone(route<Shared::kNone>());
Registration const shared(route<Shared::kAlone>());
Registration const gated(route<Shared::kGated>());

}  // namespace
}  // namespace llmexport
