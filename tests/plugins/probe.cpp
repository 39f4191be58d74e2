// An op that uses everything a table can say, for test_plugin_layer.py. It runs
// on the CPU and writes down what it was called with.
#include <cstring>

#include "trt/op.h"

namespace llmexport {
namespace {

enum Inputs { kX, kWeight, kCount, kTable, kScales };
enum Outputs { kY, kFacts };
enum Attributes { kTopK, kOffset, kFactCount };

bool check(Sizes const& sizes, Values const& attributes) {
  if (sizes['C'] == kUnknown || sizes['K'] <= sizes['C']) return true;
  return refuse("Probe: top_k is %d, but x has C = %lld", attributes[kTopK].integer,
                (long long)sizes['C']);
}

bool supports(Node const& node) {
  if (node.dtype == Dtype::kFloat32 && node.stored == Stored::kBytes) {
    return refuse("Probe: fp32 and a uint8 weight");
  }
  int64_t const E = node.sizes['E'];
  if (E == kUnknown || E % 8 == 0) return true;
  return refuse("Probe: E is %lld, no multiple of 8", (long long)E);
}

size_t workspace(Node const& node) {
  return size_t(node.sizes['B'] * node.sizes['T']) * 5 + node.inputCount;
}

cudaError_t enqueue(Call const& call) {
  Sizes const& s = call.sizes;
  std::memset(call.workspace, 1, workspace(call));
  int32_t const found[] = {
      int32_t(call.dtype),
      int32_t(call.stored),
      int32_t(call.scales),
      int32_t(call.input(kTable) != nullptr),
      int32_t(call.input(kScales) != nullptr),
      int32_t(s['K']),
      call.attributes[kOffset].integer,
      call.device.processors,
      int32_t(call.device.sharedBytes),
      call.input<int32_t>(kCount)[s['B'] - 1],
  };
  static_assert(sizeof found / sizeof found[0] == 10);
  std::memcpy(call.output(kFacts), found, sizeof found);
  std::memset(call.output(kY), 0, size_t(s['B'] * s['T'] * s['K']) * sizeOf(call.dtype));
  return cudaSuccess;
}

Registration const registration({
    "Probe",
    "3",
    {{"x", "BTC"},
     {"weight", "EC", Element::kW},
     {"count", "B", Element::kInt32},
     {"table", "BE", Element::kFloat32, kOptional},
     {"scales", "E", Element::kS, kOptional}},
    {{"y", "BTK"}, {"facts", "F", Element::kInt32}},
    {{"top_k", Kind::kInt, {}, 'K'}, {"offset", Kind::kInt}, {"facts", Kind::kInt, {}, 'F'}},
    enqueue,
    check,
    supports,
    workspace,
});

}  // namespace
}  // namespace llmexport
