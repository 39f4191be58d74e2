// What the nodes of MoeExperts and of its normed plugins have in common.
#pragma once

#include <vector>

#include "moe_experts/moe_experts.h"
#include "trt/op.h"

namespace llmexport {

// Its inputs and attributes by their places. A plugin may have `between` others ahead of those that
// may be left out.
enum MoeExpertsInputs {
  kX,
  kWeights,
  kExperts,
  kGateUp,
  kDown,
  kGateUpBias,
  kDownBias,
  kGateUpScales,
  kDownScales,
  kGateUpFactors,
  kDownFactors,
  kGateUpZeros,
  kDownZeros,
  kAllInputs
};
enum MoeExpertsValues {
  kActivation,
  kAlpha,
  kLimit,
  kTransposed,
  kInterleaved,
  kScaleInput,
  kFormat,
  kGroup,
  kMoeExpertsAttributes
};

inline std::vector<Tensor> moeExpertsInputs(std::vector<Tensor> const& between = {}) {
  std::vector<Tensor> inputs{{"x", "BTC"},
                             {"weights", "BTK"},
                             {"experts", "BTK", Element::kInt32},
                             {"gate_up", "EPQ", Element::kW},
                             {"down", "ERS", Element::kW},
                             {"gate_up_bias", "EJ", Element::kT, kOptional},
                             {"down_bias", "EC", Element::kT, kOptional},
                             {"gate_up_scales", "EPM", Element::kS, kOptional},
                             {"down_scales", "ERN", Element::kS, kOptional},
                             {"gate_up_factors", "EF", Element::kFloat32, kOptional},
                             {"down_factors", "EG", Element::kFloat32, kOptional},
                             {"gate_up_zeros", "EPM", Element::kUint8, kOptional},
                             {"down_zeros", "ERN", Element::kUint8, kOptional}};
  inputs.insert(inputs.begin() + kGateUpBias, between.begin(), between.end());
  return inputs;
}

inline std::vector<Attribute> moeExpertsAttributes() {
  // The choices in the order of enum class Activation and of WeightFormat.
  return {{"activation", Kind::kChoice, {"silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"}},
          {"alpha", Kind::kFloat},
          {"limit", Kind::kFloat},
          {"transposed", Kind::kBool},
          {"interleaved", Kind::kBool},
          {"scale_input", Kind::kBool},
          {"format",
           Kind::kChoice,
           {"plain", "mxfp4", "mxfp8", "nvfp4", "fp8", "uint4", "uint8", "int8"}},
          {"group", Kind::kInt}};
}

// gate_up is [E, P, Q], down [E, R, S]: the widths are rows, or columns if transposed.
inline MoeExpertsSizes moeExpertsSizesOf(Sizes const& s, MoeExpertsAttributes const& attributes) {
  int64_t const halves = s['P'] == kUnknown ? kUnknown : s['P'] / 2;
  return {product({s['B'], s['T']}), s['K'], s['E'], s['C'],
          attributes.transposed ? s['R'] : halves};
}

inline MoeExpertsAttributes moeExpertsAttributesOf(Values const& values) {
  return {Activation(values[kActivation].integer),
          values[kAlpha].real,
          values[kLimit].real,
          values[kTransposed].integer != 0,
          values[kInterleaved].integer != 0,
          values[kScaleInput].integer != 0,
          WeightFormat(values[kFormat].integer),
          values[kGroup].integer};
}

// Whether two sizes differ that are both known.
inline bool differ(int64_t a, int64_t b) { return a != kUnknown && b != kUnknown && a != b; }

// Whether the shapes fit each other, whatever form the weights have.
inline bool moeExpertsFits(Sizes const& s, Values const& values) {
  bool const transposed = moeExpertsAttributesOf(values).transposed;
  if (differ(transposed ? s['P'] : s['R'], s['C'])) {
    return transposed ? refuse(
                            "MoeExperts: gate_up is transposed and has P = %lld rows, but x has "
                            "C = %lld columns",
                            (long long)s['P'], (long long)s['C'])
                      : refuse("MoeExperts: down has R = %lld rows, but x has C = %lld columns",
                               (long long)s['R'], (long long)s['C']);
  }
  int64_t const width = transposed ? s['Q'] : s['P'];
  if (width == 0 || (width > 0 && width % 2 != 0)) {
    return refuse("MoeExperts: gate_up is %lld wide, which are no gates and ups", (long long)width);
  }
  if (differ(s['J'], width)) {
    return refuse("MoeExperts: gate_up_bias has J = %lld elements, but gate_up is %lld wide",
                  (long long)s['J'], (long long)width);
  }
  if (transposed && differ(2 * s['R'], width)) {
    return refuse("MoeExperts: down is transposed and has R = %lld rows, but gate_up is %lld wide",
                  (long long)s['R'], (long long)width);
  }
  return true;
}

// What a format is stored in; `group` is 0 if a node may say any.
struct Packing {
  char const* name;
  int perByte, group;
  bool hasByteScales, hasZeros;
};

// In the order of WeightFormat.
inline constexpr Packing kPackings[] = {
    {"plain", 0, 0, false, false}, {"mxfp4", 2, 32, true, false}, {"mxfp8", 1, 32, true, false},
    {"nvfp4", 2, 16, true, false}, {"fp8", 1, 0, false, false},   {"uint4", 2, 0, false, true},
    {"uint8", 1, 0, false, true},  {"int8", 1, 0, false, false},
};

// `elements` of a row of `name` should be `columns`, `perByte` a byte.
inline bool checkRow(char const* name, char letter, int64_t elements, int64_t columns,
                     int perByte) {
  if (columns != kUnknown && columns % perByte != 0) {
    return refuse("MoeExperts: %s has rows of %lld values, which fill no bytes", name,
                  (long long)columns);
  }
  if (!differ(elements, columns == kUnknown ? kUnknown : columns / perByte)) return true;
  return refuse("MoeExperts: %s has %c = %lld columns, not %s%lld", name, letter,
                (long long)elements, perByte == 2 ? "the half of " : "", (long long)columns);
}

inline bool checkScales(char const* name, char letter, int64_t scales, int64_t columns, int group) {
  if (!differ(scales, columns == kUnknown ? kUnknown : ceilDiv(columns, group))) return true;
  return refuse("MoeExperts: %s has %c = %lld columns, not one for each %d of %lld", name, letter,
                (long long)scales, group, (long long)columns);
}

inline bool checkFactors(char const* name, char letter, int64_t factors, int64_t parts) {
  return !differ(factors, parts) || refuse("MoeExperts: %s has %c = %lld columns, not %lld", name,
                                           letter, (long long)factors, (long long)parts);
}

inline bool supportsPlain(Node const& node, size_t inputs, MoeExpertsAttributes const& attributes) {
  if (node.stored == Stored::kBytes) {
    return refuse("MoeExperts: weights are bytes, but plain by their format");
  }
  if (inputs > kGateUpScales || attributes.group != 0) {
    return refuse("MoeExperts: plain weights have no scales and group = 0, not %d",
                  attributes.group);
  }
  Sizes const& s = node.sizes;
  if (attributes.transposed) return checkRow("down", 'S', s['S'], s['C'], 1);
  return checkRow("gate_up", 'Q', s['Q'], s['C'], 1) &&
         checkRow("down", 'S', s['S'], moeExpertsSizesOf(s, attributes).intermediate, 1);
}

inline bool supportsPacked(Node const& node, size_t inputs,
                           MoeExpertsAttributes const& attributes) {
  Packing const& is = kPackings[int(attributes.format)];
  Stored const scales = is.hasByteScales ? Stored::kBytes : Stored::kFloat32;
  if (node.stored != Stored::kBytes || node.scales != scales || inputs <= kDownScales) {
    return refuse("MoeExperts: %s weights are bytes with biases and scales of %s", is.name,
                  is.hasByteScales ? "bytes" : "fp32");
  }
  if (is.group ? attributes.group != is.group : attributes.group < 1) {
    return refuse("MoeExperts: %s weights have groups of %d columns%s, not %d", is.name,
                  is.group ? is.group : 1, is.group ? "" : " or more", attributes.group);
  }
  bool const isPaired = inputs % 2 == kAllInputs % 2;
  if (!isPaired || (inputs > kGateUpZeros && !is.hasZeros)) {
    return refuse(
        "MoeExperts: %s weights have scales and maybe factors%s, each twice; not %zu inputs",
        is.name, is.hasZeros ? " and zeros" : "", inputs);
  }
  Sizes const& s = node.sizes;
  int64_t const intermediate = moeExpertsSizesOf(s, attributes).intermediate;
  return checkRow("gate_up", 'Q', s['Q'], s['C'], is.perByte) &&
         checkRow("down", 'S', s['S'], intermediate, is.perByte) &&
         checkScales("gate_up_scales", 'M', s['M'], s['C'], attributes.group) &&
         checkScales("down_scales", 'N', s['N'], intermediate, attributes.group) &&
         checkFactors("gate_up_factors", 'F', s['F'], 2) &&
         checkFactors("down_factors", 'G', s['G'], 1);
}

inline bool moeExpertsSupports(Node const& node, int between = 0) {
  auto const attributes = moeExpertsAttributesOf(node.attributes);
  if (!moeExpertsServes(moeExpertsSizesOf(node.sizes, attributes), attributes)) return false;
  size_t const inputs = node.inputCount - size_t(between);
  return attributes.format == WeightFormat::kPlain ? supportsPlain(node, inputs, attributes)
                                                   : supportsPacked(node, inputs, attributes);
}

inline size_t moeExpertsWorkspaceOf(Node const& node) {
  return moeExpertsWorkspace(moeExpertsSizesOf(node.sizes, moeExpertsAttributesOf(node.attributes)),
                             node.dtype)
      .bytes;
}

inline MoeExpertsTensors moeExpertsTensorsOf(Call const& call, void* y, int between = 0) {
  return {call.input(kX),
          call.input(kWeights),
          call.input<int32_t>(kExperts),
          call.stored,
          call.input(kGateUp),
          call.input(kDown),
          call.input(between + kGateUpBias),
          call.input(between + kDownBias),
          call.input(between + kGateUpScales),
          call.input(between + kDownScales),
          call.input<float>(between + kGateUpFactors),
          call.input<float>(between + kDownFactors),
          call.input<uint8_t>(between + kGateUpZeros),
          call.input<uint8_t>(between + kDownZeros),
          y};
}

}  // namespace llmexport
