#include "moe_route/node.h"

namespace llmexport {
namespace {

enum Outputs { kWeights, kExperts };

template <Shared kShared>
struct Inputs {
  static constexpr int kLogits = 0, kGate = 1, kBias = kShared == Shared::kGated ? 2 : 1;
};

// MoeRoute's own plugin, and those of plugins/shared_route.py.
template <Shared kShared>
constexpr char const* kName = kShared == Shared::kNone    ? "MoeRoute"
                              : kShared == Shared::kAlone ? "SharedMoeRoute"
                                                          : "GatedSharedMoeRoute";

MoeRouteSizes sizesOf(Sizes const& s, int64_t pitch) { return {s['B'], s['T'], s['E'], pitch}; }

template <Shared kShared>
bool check(Sizes const& sizes, Values const& values) {
  return moeRouteNodeFits<kShared>(kName<kShared>, "shared_gate", sizes,
                                   moeRouteAttributesOf<kShared>(values));
}

template <Shared kShared>
bool supports(Node const& node) {
  return moeRouteServes(sizesOf(node.sizes, node.pitch),
                        moeRouteAttributesOf<kShared>(node.attributes));
}

template <Shared kShared>
cudaError_t enqueue(Call const& call) {
  using In = Inputs<kShared>;
  MoeRouteTensors const tensors{call.input(In::kLogits), call.input(In::kBias),
                                call.output(kWeights), call.output<int32_t>(kExperts),
                                kShared == Shared::kGated ? call.input(In::kGate) : nullptr};
  return moeRoute(call.dtype, sizesOf(call.sizes, call.pitch),
                  moeRouteAttributesOf<kShared>(call.attributes), tensors, call.stream);
}

template <Shared kShared>
Op route() {
  std::vector<Tensor> inputs{joins({"logits", "BTE"})};
  if (kShared == Shared::kGated) inputs.push_back(joins({"shared_gate", "BTL"}));
  inputs.push_back({"bias", "E", Element::kT, kOptional});
  return {kName<kShared>,
          "1",
          inputs,
          {{"weights", "BTK"}, {"experts", "BTK", Element::kInt32}},
          moeRouteAttributes<kShared>(),
          enqueue<kShared>,
          check<kShared>,
          supports<kShared>};
}

Registration const alone(route<Shared::kNone>());
Registration const shared(route<Shared::kAlone>());
Registration const gated(route<Shared::kGated>());

}  // namespace
}  // namespace llmexport
