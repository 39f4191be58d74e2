// Merges the results of the splits of the keys.
#pragma once

#include "common/early_launch.cuh"
#include "common/element.cuh"
#include "sink_attention/rows.cuh"

namespace llmexport {

constexpr int kAttentionMaxSplits = 512;

// Merges the splits of a row, and the sink with them. Grid: the B * T * H rows of y. Each warp takes
// every fourth split, a lane two columns at a time. It is launched early, while the last splits are
// still made.
//
// All is fp32 and y is rounded to T once; a warp adds its splits in order, then the four warps'
// sums are added. A split weighs exp2Fast (2**-22) of a log2f (1 unit in the last place), whose own
// size costs 2**-24 of it: 2**-17 of a weight where logits are about 100. modeling_gpt_oss.py has
// no splits; rows.cuh says how it rounds.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionMergeKernel(AttentionCall<T> call) {
  SHARED_ARRAY(float, weights, kAttentionMaxSplits);
  SHARED_ARRAY(float, sums, kAttentionWarps* kAttentionMaxSize);
  int64_t const row = blockIdx.x;
  int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int const head = int(row % call.heads);
  float const* const logs = call.logWeight + row * call.splits;
  waitForPrevious();
  float const sink = call.sinks ? toFloat(call.sinks[head]) * kLog2e : -INFINITY;
  float top = sink;
  for (int s = lane; s < call.splits; s += kWarp) top = fmaxf(top, logs[s]);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  float const base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int s = lane; s < call.splits; s += kWarp) {
    float const weight = exp2Fast(logs[s] - base);
    total += weight;
    if (warp == 0) weights[s] = weight;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(~0u, total, offset);
  }
  total += exp2Fast(sink - base);
  __syncthreads();
  float const* const partial = call.partial + row * call.splits * call.size;
  for (int column = 2 * lane; column < call.size; column += 2 * kWarp) {
    Vector<float, 2> sum{};
#pragma unroll 8
    for (int s = warp; s < call.splits; s += kAttentionWarps) {
      auto const part = load<2>(partial + int64_t(s) * call.size + column);
      sum.at[0] += weights[s] * part.at[0];
      sum.at[1] += weights[s] * part.at[1];
    }
    store<2>(sums + warp * kAttentionMaxSize + column, sum);
  }
  __syncthreads();
  for (int column = threadIdx.x; column < call.size; column += kAttentionThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) sum += sums[w * kAttentionMaxSize + column];
    call.y[row * call.size + column] = fromFloat<T>(total == 0.0f ? 0.0f : sum / total);
  }
}

}  // namespace llmexport
