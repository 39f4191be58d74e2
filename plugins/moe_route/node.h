// What the nodes of MoeRoute, of plugins/shared_route.py and of plugins/normed_route.py have in
// common.
#pragma once

#include <vector>

#include "moe_route/moe_route.h"
#include "trt/op.h"

namespace llmexport {

// The experts that each token has behind those that it chose: none, or some of weight 1 or of that
// of a gate.
enum class Shared { kNone, kAlone, kGated };

enum MoeRouteValues {
  kTopK,
  kScoring,
  kRenormalise,
  kScale,
  kGroups,
  kGroupsKept,
  kGroupBest,
  kSlots
};

// Behind its own attributes a plugin may have others.
template <Shared kShared>
constexpr int kMoeRouteAttributes = kShared == Shared::kNone ? kSlots : kSlots + 1;

template <Shared kShared>
std::vector<Attribute> moeRouteAttributes() {
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
  return attributes;
}

template <Shared kShared>
MoeRouteAttributes moeRouteAttributesOf(Values const& values) {
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

// `plugin` is named where it refuses; `gate` is its input that has one gate a token.
template <Shared kShared>
bool moeRouteNodeFits(char const* plugin, char const* gate, Sizes const& sizes,
                      MoeRouteAttributes const& attributes) {
  if (kShared != Shared::kNone && attributes.always < 1) {
    return refuse("%s: slots is %d, which leaves none behind top_k = %d", plugin,
                  attributes.slots(), attributes.topK);
  }
  if (kShared == Shared::kGated && sizes['L'] != kUnknown && sizes['L'] != 1) {
    return refuse("%s: %s has L = %lld, not one gate", plugin, gate, (long long)sizes['L']);
  }
  return moeRouteFits({sizes['B'], sizes['T'], sizes['E']}, attributes);
}

}  // namespace llmexport
