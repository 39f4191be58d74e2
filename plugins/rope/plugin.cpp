#include "rope/rope.h"
#include "trt/op.h"

namespace llmexport {
namespace {

int32_t check(Sizes const& sizes, Values const&) {
  int64_t const D = sizes['D'], R = sizes['R'];
  if (D == Sizes::kUnknown || R == Sizes::kUnknown || 2 * R <= D) return 0;
  return refuse("Rope: cos has R = %lld angles, but x has D = %lld dimensions, fewer than 2 * R",
                (long long)R, (long long)D);
}

int32_t supports(Node const& node) {
  for (char const* const letters : {"BT", "H", "D"}) {
    if (int32_t const error = checkProduct("Rope", node.sizes, letters, INT32_MAX)) return error;
  }
  return 0;
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  return rope(call.dtype, {s['B'], s['H'], s['T'], s['D'], s['R']}, call.attributes[0].integer,
              call.inputs[0], call.inputs[1], call.inputs[2], call.outputs[0], call.stream);
}

Registration const registration({
    "Rope",
    {{"x", "BHTD"}, {"cos", "BTR"}, {"sin", "BTR"}},
    {{"y", "BHTD"}},
    {{"interleaved", Kind::kBool}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
