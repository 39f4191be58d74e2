// Merges the results of the splits of the keys.
#pragma once

#include "common/early_launch.cuh"
#include "common/element.cuh"
#include "sink_attention/rows.cuh"

namespace llmexport {

constexpr int kAttentionMaxSplits = 512;

// Of a thread: columns of a split, and splits that it asks for before it adds the first of them.
constexpr int kMergeColumns = 4, kMergeAhead = 16;

// The splits that a team of threads merges: every `teams`-th from `first` on, each thread some of
// its columns.
struct MergePart {
  float const* from;  // the columns of split 0
  int first, teams, splits, size;

  __device__ __forceinline__ void load(Vector<float, kMergeColumns> (&parts)[kMergeAhead],
                                       int begin) const {
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      int const split = begin + i * teams;
      parts[i] = {};
      if (split < splits) {
        parts[i] = llmexport::load<kMergeColumns>(from + int64_t(split) * size);
      }
    }
  }
};

// Merges the splits of a row, and the sink with them. Grid: the B * T * H rows of y. A thread takes
// four columns of every n-th split, so that the block's n teams have all columns; each waits for
// memory once in 16 splits, the first time while the weights are made. It is launched early, while
// the last splits are still made.
//
// All is fp32 and y is rounded to T once; a team adds its splits in order, then the teams' sums are
// added. A split weighs exp2Fast (2**-22) of a log2f (1 unit in the last place), whose own size
// costs 2**-24 of it: 2**-17 of a weight where logits are about 100. modeling_gpt_oss.py has no
// splits; rows.cuh says how it rounds.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    sinkAttentionMergeKernel(AttentionCall<T> call) {
  SHARED_ARRAY(float, logs, kAttentionMaxSplits);
  SHARED_ARRAY(float, sums, kAttentionThreads* kMergeColumns);
  int64_t const row = blockIdx.x;
  int const lane = threadIdx.x % kWarp, splits = call.splits, size = call.size;
  int const head = int(row % call.heads), chunks = size / kMergeColumns;
  int const team = threadIdx.x / chunks, column = threadIdx.x % chunks * kMergeColumns;
  int const teams = kAttentionThreads / chunks;
  // Threads past the last team have no splits.
  MergePart const mine{call.partial + row * splits * size + column, team, teams,
                       team < teams ? splits : 0, size};
  waitForPrevious();
  Vector<float, kMergeColumns> parts[kMergeAhead];
  mine.load(parts, mine.first);
  float const sink = call.sinks ? toFloat(call.sinks[head]) * kLog2e : -INFINITY;
#pragma unroll 1
  for (int s = threadIdx.x; s < splits; s += kAttentionThreads) {
    logs[s] = call.logWeight[row * splits + s];
  }
  __syncthreads();
  float top = sink;
#pragma unroll 2
  for (int s = lane; s < splits; s += kWarp) top = fmaxf(top, logs[s]);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
  }
  float const base = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
#pragma unroll 2
  for (int s = lane; s < splits; s += kWarp) total += exp2Fast(logs[s] - base);
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(~0u, total, offset);
  }
  total += exp2Fast(sink - base);
  Vector<float, kMergeColumns> sum{};
#pragma unroll 1
  for (int begin = mine.first; begin < mine.splits; begin += kMergeAhead * teams) {
    if (begin > mine.first) mine.load(parts, begin);
#pragma unroll
    for (int i = 0; i < kMergeAhead; ++i) {
      int const split = begin + i * teams;
      float const weight = split < mine.splits ? exp2Fast(logs[split] - base) : 0.0f;
#pragma unroll
      for (int c = 0; c < kMergeColumns; ++c) sum.at[c] += weight * parts[i].at[c];
    }
  }
  if (team < teams) store<kMergeColumns>(sums + team * size + column, sum);
  __syncthreads();
  for (int c = threadIdx.x; c < size; c += kAttentionThreads) {
    float merged = 0.0f;
#pragma unroll 2
    for (int t = 0; t < teams; ++t) merged += sums[t * size + c];
    call.y[row * size + c] = fromFloat<T>(total == 0.0f ? 0.0f : merged / total);
  }
}

}  // namespace llmexport
