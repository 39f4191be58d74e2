#include "rope/rope.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kCos, kSin };
enum Outputs { kY };
enum Attributes { kInterleaved };

RopeSizes sizesOf(Sizes const& s) { return {s['B'], s['H'], s['T'], s['D'], s['R']}; }

RopeAttributes attributesOf(Values const& values) { return {values[kInterleaved].integer != 0}; }

bool check(Sizes const& sizes, Values const&) { return ropeFits(sizesOf(sizes)); }

bool supports(Node const& node) { return ropeServes(sizesOf(node.sizes)); }

cudaError_t enqueue(Call const& call) {
  RopeTensors const tensors{call.input(kX), call.input(kCos), call.input(kSin), call.output(kY)};
  return rope(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors, call.stream);
}

Registration const registration({
    "Rope",
    "1",
    {{"x", "BHTD"}, {"cos", "BTR"}, {"sin", "BTR"}},
    {{"y", "BHTD"}},
    {{"interleaved", Kind::kBool}},
    enqueue,
    check,
    supports,
});

}  // namespace
}  // namespace llmexport
