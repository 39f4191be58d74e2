#include "sink_attention/sink_attention.h"
#include "trt/op.h"

namespace llmexport {
namespace {

enum Attributes { kScale, kSoftcap, kWindow };
enum Inputs { kQ, kK, kV, kStart, kLength, kSinks };

SinkAttentionSizes sizesOf(Sizes const& s) {
  return {s['B'], s['H'], s['G'], s['T'], s['S'], s['D']};
}

int32_t check(Sizes const& sizes, Values const&) {
  int64_t const H = sizes['H'], G = sizes['G'];
  if (H < 0 || G < 0 || (G > 0 && H % G == 0)) return 0;
  return refuse("SinkAttention: q has H = %lld heads, no multiple of the G = %lld of k and v",
                (long long)H, (long long)G);
}

int32_t supports(Node const& node) {
  int64_t const D = node.sizes['D'];
  if (D > kAttentionMaxSize) {
    return refuse("SinkAttention: heads have D = %lld, over the %d that the kernels are made for",
                  (long long)D, kAttentionMaxSize);
  }
  int32_t const error = checkProduct("SinkAttention", node.sizes, "BHT", INT32_MAX);
  return error ? error : checkProduct("SinkAttention", node.sizes, "S", INT32_MAX);
}

size_t workspace(Node const& node) {
  return sinkAttentionWorkspace(sizesOf(node.sizes), node.attributes[kWindow].integer, node.dtype);
}

cudaError_t enqueue(Call const& call) {
  SinkAttentionAttributes const attributes{call.attributes[kScale].real,
                                           call.attributes[kSoftcap].real,
                                           call.attributes[kWindow].integer};
  return sinkAttention(call.dtype, sizesOf(call.sizes), attributes, call.inputs[kQ],
                       call.inputs[kK], call.inputs[kV], call.inputs[kStart], call.inputs[kLength],
                       call.inputs[kSinks], call.outputs[0], call.workspace, call.device,
                       call.stream);
}

Registration const registration({
    "SinkAttention",
    {{"q", "BHTD"},
     {"k", "BGSD"},
     {"v", "BGSD"},
     {"start", "B", Element::kInt32},
     {"length", "B", Element::kInt32},
     {"sinks", "H", Element::kT, kOptional}},
    {{"y", "BHTD"}},
    {{"scale", Kind::kFloat}, {"softcap", Kind::kFloat}, {"window", Kind::kInt}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
