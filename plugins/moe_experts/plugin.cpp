#include "moe_experts/moe_experts.h"
#include "trt/op.h"

namespace llmexport {
namespace {

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
enum Outputs { kY };
enum Attributes { kActivation, kAlpha, kLimit, kTransposed, kInterleaved, kScaleInput };

// gate_up is [E, P, Q], down [E, R, S]: the widths are rows, or columns if transposed.
MoeExpertsSizes sizesOf(Sizes const& s, MoeExpertsAttributes const& attributes) {
  int64_t const halves = s['P'] == kUnknown ? kUnknown : s['P'] / 2;
  return {product({s['B'], s['T']}), s['K'], s['E'], s['C'],
          attributes.transposed ? s['R'] : halves};
}

MoeExpertsAttributes attributesOf(Values const& values) {
  return {Activation(values[kActivation].integer),
          values[kAlpha].real,
          values[kLimit].real,
          values[kTransposed].integer != 0,
          values[kInterleaved].integer != 0,
          values[kScaleInput].integer != 0};
}

// Whether two sizes differ that are both known.
bool differ(int64_t a, int64_t b) { return a != kUnknown && b != kUnknown && a != b; }

// Whether the shapes fit each other, whatever form the weights have.
bool check(Sizes const& s, Values const& values) {
  bool const transposed = attributesOf(values).transposed;
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

// `elements` of a row of `name` should be `columns` of x, or half as many bytes of MXFP4.
bool checkRow(char const* name, char letter, int64_t elements, int64_t columns, bool isMxfp4) {
  if (!differ(elements, isMxfp4 && columns != kUnknown ? columns / 2 : columns)) return true;
  return refuse("MoeExperts: %s has %c = %lld columns, not %s%lld", name, letter,
                (long long)elements, isMxfp4 ? "the half of " : "", (long long)columns);
}

bool checkScales(char const* name, char letter, int64_t scales, int64_t columns) {
  if (columns == kUnknown) return true;
  if (columns % kMoeScaleBlock != 0) {
    return refuse("MoeExperts: %lld columns are no blocks of %d MXFP4 values", (long long)columns,
                  kMoeScaleBlock);
  }
  if (!differ(scales, columns / kMoeScaleBlock)) return true;
  return refuse("MoeExperts: %s has %c = %lld columns, not one for each %d of %lld", name, letter,
                (long long)scales, kMoeScaleBlock, (long long)columns);
}

bool supports(Node const& node) {
  Sizes const& s = node.sizes;
  auto const attributes = attributesOf(node.attributes);
  auto const sizes = sizesOf(s, attributes);
  bool const isMxfp4 = node.stored == Stored::kMxfp4;
  if (!moeExpertsServes(sizes, attributes, node.stored)) return false;
  if (isMxfp4 && node.inputCount != kAllInputs) {
    return refuse(
        "MoeExperts: weights of bytes are MXFP4, which has biases and scales: %d inputs, "
        "not %zu",
        kAllInputs, node.inputCount);
  }
  if (!isMxfp4 && node.inputCount > kGateUpScales) {
    return refuse("MoeExperts: there are scales, but the weights are no bytes of MXFP4");
  }
  if (attributes.transposed) return checkRow("down", 'S', s['S'], s['C'], false);
  return checkRow("gate_up", 'Q', s['Q'], s['C'], isMxfp4) &&
         checkRow("down", 'S', s['S'], sizes.intermediate, isMxfp4) &&
         (!isMxfp4 || (checkScales("gate_up_scales", 'M', s['M'], s['C']) &&
                       checkScales("down_scales", 'N', s['N'], sizes.intermediate)));
}

size_t workspace(Node const& node) {
  return moeExpertsWorkspace(sizesOf(node.sizes, attributesOf(node.attributes)), node.dtype).bytes;
}

cudaError_t enqueue(Call const& call) {
  auto const attributes = attributesOf(call.attributes);
  MoeExpertsTensors const tensors{call.input(kX),
                                  call.input(kWeights),
                                  call.input<int32_t>(kExperts),
                                  call.stored,
                                  call.input(kGateUp),
                                  call.input(kDown),
                                  call.input(kGateUpBias),
                                  call.input(kDownBias),
                                  call.input<uint8_t>(kGateUpScales),
                                  call.input<uint8_t>(kDownScales),
                                  call.output(kY)};
  return moeExperts(call.dtype, sizesOf(call.sizes, attributes), attributes, tensors,
                    call.workspace, call.device, call.stream);
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
