#include "moe_experts/moe_experts.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Attributes { kActivation, kAlpha, kLimit, kTransposed, kInterleaved, kScaleInput };
enum Inputs {
  kX,
  kWeights,
  kExperts,
  kGateUp,
  kDown,
  kGateUpBias,
  kDownBias,
  kGateUpScales,
  kDownScales,
  kAllInputs
};

// gate_up is [E, P, Q], down [E, R, S]: the widths are rows, or columns if transposed.
MoeExpertsSizes sizesOf(Sizes const& s, Values const& values) {
  return {s['B'] * s['T'], s['K'], s['E'], s['C'],
          values[kTransposed].integer ? s['R'] : s['P'] / 2};
}

// Whether two sizes differ that are both known.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

// What must hold whatever type the weights have.
int32_t check(Sizes const& s, Values const& values) {
  bool const transposed = values[kTransposed].integer != 0;
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
  return 0;
}

// `elements` of a row of `name` should be `columns` of x, or half as many bytes of MXFP4.
int32_t checkRow(char const* name, char letter, int64_t elements, int64_t columns, bool isMxfp4) {
  if (!differ(elements, isMxfp4 && columns >= 0 ? columns / 2 : columns)) return 0;
  return refuse("MoeExperts: %s has %c = %lld columns, not %s%lld", name, letter,
                (long long)elements, isMxfp4 ? "the half of " : "", (long long)columns);
}

int32_t checkScales(char const* name, char letter, int64_t scales, int64_t columns) {
  if (columns >= 0 && columns % kMoeScaleBlock != 0) {
    return refuse("MoeExperts: %lld columns are no blocks of %d MXFP4 values", (long long)columns,
                  kMoeScaleBlock);
  }
  if (!differ(scales, columns >= 0 ? columns / kMoeScaleBlock : columns)) return 0;
  return refuse("MoeExperts: %s has %c = %lld columns, not one for each %d of %lld", name, letter,
                (long long)scales, kMoeScaleBlock, (long long)columns);
}

int32_t checkLimits(Node const& node) {
  Sizes const& s = node.sizes;
  if (int32_t const error = checkProduct("MoeExperts", s, "BTK", kMoeMaxPairs)) return error;
  MoeExpertsSizes const sizes = sizesOf(s, node.attributes);
  bool const known = s.product("BTKE") >= 0 && sizes.hidden >= 0 && sizes.intermediate >= 0;
  int64_t const blocks = known ? moeExpertsMostBlocks(sizes) : 0;
  if (blocks <= kMaxGridX) return 0;
  return refuse("MoeExperts: %lld pairs of C = %lld columns take %lld blocks, a grid holds %lld",
                (long long)sizes.pairs(), (long long)sizes.hidden, (long long)blocks,
                (long long)kMaxGridX);
}

int32_t supports(Node const& node) {
  Sizes const& s = node.sizes;
  bool const isMxfp4 = !node.stored, transposed = node.attributes[kTransposed].integer != 0;
  if (s['E'] > kMoeMaxExperts) {
    return refuse("MoeExperts: E = %lld experts, the kernels sort %d", (long long)s['E'],
                  kMoeMaxExperts);
  }
  if (int32_t const error = checkLimits(node)) return error;
  if (isMxfp4 && node.inputs != kAllInputs) {
    return refuse(
        "MoeExperts: weights of bytes are MXFP4, which has biases and scales: %d inputs, "
        "not %zu",
        kAllInputs, node.inputs);
  }
  if (!isMxfp4 && node.inputs > kGateUpScales) {
    return refuse("MoeExperts: there are scales, but the weights are no bytes of MXFP4");
  }
  if (isMxfp4 && transposed) return refuse("MoeExperts: MXFP4 weights are never transposed");
  if (transposed) return checkRow("down", 'S', s['S'], s['C'], false);
  int64_t const intermediate = s['P'] < 0 ? s['P'] : s['P'] / 2;
  if (int32_t const error = checkRow("gate_up", 'Q', s['Q'], s['C'], isMxfp4)) return error;
  if (int32_t const error = checkRow("down", 'S', s['S'], intermediate, isMxfp4)) return error;
  if (!isMxfp4) return 0;
  if (int32_t const error = checkScales("gate_up_scales", 'M', s['M'], s['C'])) return error;
  return checkScales("down_scales", 'N', s['N'], intermediate);
}

size_t workspace(Node const& node) {
  return moeExpertsWorkspace(sizesOf(node.sizes, node.attributes), node.dtype).bytes;
}

cudaError_t enqueue(Call const& call) {
  Values const& values = call.attributes;
  MoeExpertsAttributes const attributes{Activation(values[kActivation].integer),
                                        values[kAlpha].real,
                                        values[kLimit].real,
                                        values[kTransposed].integer != 0,
                                        values[kInterleaved].integer != 0,
                                        values[kScaleInput].integer != 0};
  MoeExpertsInputs const inputs{call.inputs[kX],
                                call.inputs[kWeights],
                                static_cast<int32_t const*>(call.inputs[kExperts]),
                                call.inputs[kGateUp],
                                call.inputs[kDown],
                                call.inputs[kGateUpBias],
                                call.inputs[kDownBias],
                                static_cast<uint8_t const*>(call.inputs[kGateUpScales]),
                                static_cast<uint8_t const*>(call.inputs[kDownScales])};
  return moeExperts(call.dtype, call.stored, sizesOf(call.sizes, values), attributes, inputs,
                    call.outputs[0], call.workspace, call.device, call.stream);
}

Registration const registration({
    "MoeExperts",
    {{"x", "BTC"},
     {"weights", "BTK"},
     {"experts", "BTK", Element::kInt32},
     {"gate_up", "EPQ", Element::kW},
     {"down", "ERS", Element::kW},
     {"gate_up_bias", "EJ", Element::kT, kOptional},
     {"down_bias", "EC", Element::kT, kOptional},
     {"gate_up_scales", "EPM", Element::kUint8, kOptional},
     {"down_scales", "ERN", Element::kUint8, kOptional}},
    {{"y", "BTC"}},
    // The choices in the order of enum class Activation.
    {{"activation", Kind::kChoice, {"silu", "gelu_tanh", "gelu_erf", "swiglu_clamped"}},
     {"alpha", Kind::kFloat},
     {"limit", Kind::kFloat},
     {"transposed", Kind::kBool},
     {"interleaved", Kind::kBool},
     {"scale_input", Kind::kBool}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
