#include "sink_attention/sink_attention.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kQ, kK, kV, kStart, kLength, kSinks };
enum Outputs { kY };
enum Attributes { kScale, kSoftcap, kWindow };

SinkAttentionSizes sizesOf(Sizes const& s) {
  return {s['B'], s['H'], s['G'], s['T'], s['S'], s['D']};
}

SinkAttentionAttributes attributesOf(Values const& values) {
  return {values[kScale].real, values[kSoftcap].real, values[kWindow].integer};
}

bool check(Sizes const& sizes, Values const&) { return sinkAttentionFits(sizesOf(sizes)); }

bool supports(Node const& node) { return sinkAttentionServes(sizesOf(node.sizes)); }

size_t workspace(Node const& node) {
  return sinkAttentionWorkspace(sizesOf(node.sizes), attributesOf(node.attributes), node.dtype);
}

cudaError_t enqueue(Call const& call) {
  SinkAttentionTensors const tensors{call.input(kQ),
                                     call.input(kK),
                                     call.input(kV),
                                     call.input<int32_t>(kStart),
                                     call.input<int32_t>(kLength),
                                     call.input(kSinks),
                                     call.output(kY)};
  return sinkAttention(call.dtype, sizesOf(call.sizes), attributesOf(call.attributes), tensors,
                       call.workspace, call.device, call.stream);
}

Registration const registration({
    "SinkAttention",
    "2",
    {{"q", "BHTD"},
     {"k", "BGSD"},
     {"v", "BGSD"},
     {"start", "B", Element::kInt32},
     {"length", "B", Element::kInt32},
     {"sinks", "H", Element::kT, kOptional}},
    {{"y", "BTHD"}},
    {{"scale", Kind::kFloat}, {"softcap", Kind::kFloat}, {"window", Kind::kInt}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
