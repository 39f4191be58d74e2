// Launch plans and launcher of SinkAttention, for the tests of its kernels by
// ctypes.
#include "sink_attention/sink_attention.h"

using namespace llmexport;

namespace {

SinkAttentionSizes sizesOf(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" void attention_plan(int64_t const* sizes, int window, int dtype, bool pointersAligned,
                               int processors, int64_t* out) {
  auto const plan = sinkAttentionPlan(sizesOf(sizes), {1.0f, 0.0f, window}, Dtype(dtype),
                                      pointersAligned, {processors, 0});
  int64_t const values[] = {int64_t(plan.path),           plan.splits,
                            int64_t(plan.workspaceBytes), int64_t(plan.attend.sharedBytes),
                            plan.attend.grid.x,           plan.attend.grid.y,
                            plan.attend.block.x,          plan.merge.grid.x};
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) out[i] = values[i];
}

extern "C" int64_t attention_workspace(int64_t const* sizes, int window, int dtype) {
  return int64_t(sinkAttentionWorkspace(sizesOf(sizes), {1.0f, 0.0f, window}, Dtype(dtype)));
}

// `pointers`: q, k, v, start, length, sinks, y, workspace.
extern "C" int attention_run(int64_t const* sizes, float scale, int window, int dtype,
                             int processors, void* const* pointers) {
  auto const at = [&](int i) { return pointers[i]; };
  SinkAttentionTensors const tensors{
      at(0), at(1), at(2), typed<int32_t>(at(3)), typed<int32_t>(at(4)), at(5), at(6)};
  return sinkAttention(Dtype(dtype), sizesOf(sizes), {scale, 0.0f, window}, tensors, at(7),
                       {processors, 0}, nullptr);
}
