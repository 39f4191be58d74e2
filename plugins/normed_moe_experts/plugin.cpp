#include "moe_experts/node.h"
#include "normed_moe_experts/normed_moe_experts.h"

namespace llmexport {
namespace {

// Those between MoeExperts' that every node has and those that it may leave out.
enum Between { kResidual = kGateUpBias, kNormWeight, kShared, kSharedGate };
enum Outputs { kY, kSum };
// Behind MoeExperts' own.
enum Attributes {
  kEpsilon = kMoeExpertsAttributes,
  kWeightOffset,
  kRoundBeforeWeight,
  kGateColumn
};

// The shared expert's result, and its gate.
constexpr int kNone = 0, kAlone = 1, kGated = 2;

template <int kAddends>
constexpr int kBetween = 2 + kAddends;

template <int kAddends>
bool check(Sizes const& s, Values const& values) {
  if (!moeExpertsFits(s, values)) return false;
  if constexpr (kAddends == kGated) {
    int const column = values[kGateColumn].integer;
    if (column < 0 || (s['L'] != kUnknown && column >= s['L'])) {
      return refuse("NormedGatedSharedMoeExperts: gate_column is %d of L = %lld columns", column,
                    (long long)s['L']);
    }
  }
  return true;
}

template <int kAddends>
bool supports(Node const& node) {
  auto const attributes = moeExpertsAttributesOf(node.attributes);
  return moeExpertsSupports(node, kBetween<kAddends>) &&
         normedMoeExpertsServes(moeExpertsSizesOf(node.sizes, attributes), attributes);
}

template <int kAddends>
cudaError_t enqueue(Call const& call) {
  Values const& values = call.attributes;
  NormedMoeExpertsAttributes const attributes{
      moeExpertsAttributesOf(values),
      {values[kEpsilon].real, values[kWeightOffset].real, values[kRoundBeforeWeight].integer != 0}};
  char const* gate = nullptr;
  if constexpr (kAddends == kGated) {
    gate = call.input<char>(kSharedGate) + values[kGateColumn].integer * sizeOf(call.dtype);
  }
  NormedMoeExpertsTensors const tensors{moeExpertsTensorsOf(call, nullptr, kBetween<kAddends>),
                                        call.input(kResidual),
                                        call.input(kNormWeight),
                                        kAddends > kNone ? call.input(kShared) : nullptr,
                                        gate,
                                        call.sizes['L'],
                                        call.output(kY),
                                        call.output(kSum)};
  return normedMoeExperts(call.dtype, moeExpertsSizesOf(call.sizes, attributes.experts), attributes,
                          tensors, call.workspace, call.device, call.stream);
}

// `name` is that in plugins/normed.py.
template <int kAddends>
Op normed(char const* name) {
  std::vector<Tensor> between{{"residual", "BTC"}, {"norm_weight", "C"}};
  if (kAddends > kNone) between.push_back({"shared", "BTC"});
  if (kAddends == kGated) between.push_back({"shared_gate", "BTL"});
  std::vector<Attribute> attributes = moeExpertsAttributes();
  attributes.push_back({"epsilon", Kind::kFloat});
  attributes.push_back({"weight_offset", Kind::kFloat});
  attributes.push_back({"round_before_weight", Kind::kBool});
  if (kAddends == kGated) attributes.push_back({"gate_column", Kind::kInt});
  return {name,
          "1",
          moeExpertsInputs(between),
          {{"y", "BTC"}, {"sum", "BTC"}},
          attributes,
          enqueue<kAddends>,
          check<kAddends>,
          supports<kAddends>,
          moeExpertsWorkspaceOf};
}

Registration const alone(normed<kNone>("NormedMoeExperts"));
Registration const shared(normed<kAlone>("NormedSharedMoeExperts"));
Registration const gated(normed<kGated>("NormedGatedSharedMoeExperts"));

}  // namespace
}  // namespace llmexport
