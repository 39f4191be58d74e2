// What the nodes of QkNormRope and QkNormRopeWrite have in common.
#pragma once

#include <vector>

#include "qk_norm_rope/qk_norm_rope.h"
#include "trt/op.h"

namespace llmexport {

inline std::vector<Attribute> qkNormRopeAttributes() {
  return {{"interleaved", Kind::kBool},
          {"epsilon", Kind::kFloat},
          {"weight_offset", Kind::kFloat},
          {"round_before_weight", Kind::kBool},
          {"norm_first", Kind::kBool}};
}

inline QkNormRopeAttributes qkNormRopeAttributesOf(Values const& values) {
  enum { kInterleaved, kEpsilon, kWeightOffset, kRoundBeforeWeight, kNormFirst };
  return {values[kInterleaved].integer != 0, values[kEpsilon].real, values[kWeightOffset].real,
          values[kRoundBeforeWeight].integer != 0, values[kNormFirst].integer != 0};
}

inline QkNormRopeSizes qkNormRopeSizesOf(Sizes const& s, int64_t pitch) {
  return {s['B'], s['T'], s['H'], s['G'], s['D'], s['R'], s['Q'], pitch};
}

}  // namespace llmexport
