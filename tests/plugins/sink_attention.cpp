// Launch plans and launcher of SinkAttention, for the tests of its kernels by
// ctypes.
#include "sink_attention/sink_attention.h"

using namespace llmexport;

namespace {

SinkAttentionSizes sizesOf(int64_t const* s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

}  // namespace

extern "C" void attention_plan(int64_t const* sizes, int window, int dtype, bool pointersAligned,
                               int processors, int64_t* out) {
  auto const plan =
      sinkAttentionPlan(sizesOf(sizes), window, Dtype(dtype), pointersAligned, processors);
  int64_t const values[] = {int64_t(plan.path),           plan.splits,
                            int64_t(plan.workspaceBytes), int64_t(plan.attend.sharedBytes),
                            plan.attend.grid.x,           plan.attend.grid.y,
                            plan.attend.block.x,          plan.merge.grid.x};
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) out[i] = values[i];
}

extern "C" int64_t attention_workspace(int64_t const* sizes, int window, int dtype) {
  return int64_t(sinkAttentionWorkspace(sizesOf(sizes), window, Dtype(dtype)));
}

// `pointers`: q, k, v, start, length, sinks, y, workspace.
extern "C" int attention_run(int64_t const* sizes, float scale, int window, int dtype,
                             int processors, void* const* pointers) {
  return sinkAttention(Dtype(dtype), sizesOf(sizes), {scale, 0.0f, window}, pointers[0],
                       pointers[1], pointers[2], pointers[3], pointers[4], pointers[5], pointers[6],
                       pointers[7], {processors, 0}, nullptr);
}
